"""Sampling from an assembled model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer
from transformers.modeling_outputs import CausalLMOutput

from lowmem_ft.core.errors import ConfigError, DataError, UnsupportedError
from lowmem_ft.core.mode import evaluating
from lowmem_ft.core.positions import has_position_table, positions_of
from lowmem_ft.core.token_ids import check_ids
from lowmem_ft.data.chat import ChatRenderer
from lowmem_ft.runtime.attend import SingleQueries
from lowmem_ft.runtime.blocks import causal_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How many tokens follow a prompt, and how each is chosen; see `generate`.

    Raises:
        ConfigError: a value that means nothing.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        kinds = {"max_new_tokens": Integral, "temperature": Real, "top_p": Real, "seed": Integral}
        for name, kind in kinds.items():
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, kind):
                allowed = "a whole number" if kind is Integral else "a number"
                raise ConfigError(f"{name} has no such value.", given=repr(given), allowed=allowed)
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            # beyond these the scores that are divided by it are no numbers any more, or all the same
            "temperature": (self.temperature == 0 or 1e-6 <= self.temperature <= 1e6, "0, or from 1e-6 to 1e6"),
            "top_p": (0 <= self.top_p <= 1, "from 0 to 1"),
            "seed": (0 <= self.seed < 1 << 63, "from 0 to 2**63 - 1"),
        }
        for name, (is_allowed, allowed) in rules.items():
            if not is_allowed:
                raise ConfigError(f"{name} has no such value.", given=getattr(self, name), allowed=allowed)
        unused = [name for name, off in (("top_p", 1), ("seed", 0)) if getattr(self, name) != off]
        if unused and self.temperature == 0:
            warnings.warn(
                f"{' and '.join(unused)}: without effect at temperature 0, which takes the likeliest token",
                stacklevel=1,  # the caller is generated code
            )

    def options(self) -> dict[str, Any]:
        """For transformers' GenerationConfig."""
        if self.temperature == 0:
            return {"do_sample": False}
        # from all tokens: transformers would take the 50 likeliest
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model said in a conversation.

    Attributes:
        text: without special tokens and outer white space.
        tokens: generated, special ones included.
        ended: by the model (`end`), by `max_new_tokens` (`length`), because the model has no further positions
            (`positions`), or by the caller (`stopped`).
    """

    text: str
    tokens: int
    ended: Literal["end", "length", "positions", "stopped"]


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    say: Callable[[int, str], None] | None = None,
    raw: bool = False,
) -> list[str]:
    """What `model` says to each prompt.

    A tokenizer with a chat template gets each prompt as one user message, another one gets it as it is.

    Args:
        model: as `lowmem_ft.load` returns it; its mode (train or eval) is restored afterwards. Of its generation config
            the tokens that begin and end text count alone; the tokenizer's EOS and what ends answers in the chat
            template end them, too.
        prompts: a string is one.
        temperature: 0 takes the likeliest token each time; above, tokens are sampled, from the smallest set that holds
            `top_p` of the probability (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
        seed: of the sampling; the caller's random numbers are left as they are.
        say: called with the index of a prompt and each piece of its answer, once that no longer changes.
        raw: each prompt as it is, past the chat template: for what was trained on texts, or prompts with completions.

    Returns:
        one text per prompt, special tokens removed.

    Raises:
        UnsupportedError: there is no tokenizer.
        ConfigError: a value that means nothing.
        DataError: a prompt that is no text, for which the model has no positions, or of tokens that it does not know.
    """
    if tokenizer is None:
        raise UnsupportedError("The model folder holds no tokenizer, which generating text needs.")
    if not (isinstance(model, nn.Module) and isinstance(tokenizer, PreTrainedTokenizerBase)):
        raise ConfigError(
            "That is no model and its tokenizer.",
            given=f"a {type(model).__name__} and a {type(tokenizer).__name__}",
            allowed="both that lowmem_ft.load(...) returns, in that order",
        )
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with _sampled(model, seed):
        return [
            _answer(model, tokenizer, prompt, sampling, None if say is None else partial(say, index), raw=raw)
            for index, prompt in enumerate(_texts(prompts))
        ]


def _texts(prompts: object) -> list[str]:
    """Prompts one by one; a string is one. Raises DataError for what is no text."""
    several = isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Mapping)
    texts: list[Any] = list(prompts) if several else [prompts]  # type: ignore[call-overload]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(
                "A prompt is no text.",
                given=f"a {type(text).__name__}: {' '.join(str(text).split()):.60}",
                allowed="a string, or a list of strings",
                fix="of messages give what tokenizer.apply_chat_template(messages, tokenize=False, "
                "add_generation_prompt=True) makes of them, with raw=True; of token ids what tokenizer.decode does",
            )
    return texts


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    until: Sequence[str] = (),
    ends: Sequence[int] = (),
) -> list[str]:
    """What `model` puts behind token ids, one prompt after the other.

    Args:
        model, max_new_tokens, temperature, top_p: as for `generate`, whose seed is 0 here.
        prompts: used as they are.
        until: generation ends with the first of these texts; it and what is behind it is left out.
        ends: tokens that end an answer beside those of the model's generation config.

    Returns:
        one text per prompt, special tokens removed.
    """
    answers = []
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    with _sampled(model, sampling.seed):
        for ids in prompts:
            ids_1T = torch.tensor([list(ids)], dtype=torch.int64, device=model.device)
            stops = StoppingCriteriaList([_Until(tokenizer, len(ids), until)] if until else [])
            new_N = _continued(model, tokenizer, ids_1T, max_new_tokens, sampling, ends=ends, stopping_criteria=stops)
            text = str(tokenizer.decode(new_N, skip_special_tokens=True))
            answers.append(text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))])
    return answers


class _Until:
    """Whether what was generated behind `begin` tokens holds one of the texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, begin: int, until: Sequence[str]) -> None:
        self.tokenizer, self.begin, self.until = tokenizer, begin, until
        # a token is at least a byte; four more, as a character may begin in a token that is cut off
        self.reach = max(len(stop.encode()) for stop in until) + 4

    def __call__(self, ids_1T: Tensor, scores: Any, **_: Any) -> Tensor:
        tail = self.tokenizer.decode(ids_1T[0, max(self.begin, ids_1T.shape[1] - self.reach) :])
        found = any(stop in tail for stop in self.until)
        return torch.full((1,), found, dtype=torch.bool, device=ids_1T.device)


def converse(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Mapping[str, str]],
    *,
    say: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Answer:
    """The model's next message in a conversation, told as it is generated.

    Args:
        model, max_new_tokens, temperature, top_p, seed: as for `generate`.
        messages: `role` and `content` of each so far; the chat template renders all of them.
        say: called with each piece of text, once it no longer changes.
        stop: asked after each token whether to end here.

    Raises:
        UnsupportedError: there is no tokenizer, or it has no chat template.
        ConfigError: a value that means nothing.
        DataError: the template refuses the messages, or the model has no position for an answer to them.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if tokenizer is None or not tokenizer.chat_template:
        raise UnsupportedError(
            "The model's tokenizer has no chat template, so it cannot hold a conversation.",
            given=getattr(tokenizer, "name_or_path", None) or "a model folder without tokenizer",
            allowed="a tokenizer with chat_template.jinja",
            fix="use `lowmem-ft generate`, which gives prompts to the model as they are",
        )
    ids_1T = _rendered(tokenizer, messages).to(model.device)
    fix = "begin anew (/reset in a chat), or write less"
    room = _room(ids_1T, _positions(model), "The conversation is longer than the model can see.", fix)
    ends = answer_ends(tokenizer)
    stopped = False

    def stops(ids_1T: Tensor, scores: Any, **_: Any) -> Tensor:
        nonlocal stopped
        stopped = stopped or stop()
        return torch.full((ids_1T.shape[0],), stopped, dtype=torch.bool, device=ids_1T.device)

    with _sampled(model, seed):
        new_N = _continued(
            model,
            tokenizer,
            ids_1T,
            min(max_new_tokens, room),
            sampling,
            ends=ends,
            streamer=_Told(tokenizer, say),
            stopping_criteria=StoppingCriteriaList([stops]),
        )
    text = str(tokenizer.decode(new_N, skip_special_tokens=True)).strip()
    known = {*ends, *known_ends(model.generation_config)}
    return Answer(text=text, tokens=len(new_N), ended=_ended(known, new_N, stopped, max_new_tokens, room))


def answer_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What training ends texts by: under the chat template, and all others by the tokenizer's EOS. A model's generation
    config may know of neither: a base that ends texts by a token of its own has learned these from the data."""
    found = (ChatRenderer(tokenizer).answer_end(), tokenizer.eos_token_id)
    return list(dict.fromkeys(it for it in found if it is not None))


def known_ends(config: GenerationConfig) -> list[int]:
    """The tokens that end a text in a generation config, which may name one, several or none."""
    known = config.eos_token_id
    return list(known) if isinstance(known, list) else [] if known is None else [known]


class _Told:
    """A streamer for transformers that hands text on in the thread that generates it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
        self.pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say, self.begun = say, False

    def put(self, ids: Tensor) -> None:
        self.pieces.put(ids)
        self._hand_on()

    def end(self) -> None:
        self.pieces.end()
        self._hand_on()

    def _hand_on(self) -> None:
        while not self.pieces.text_queue.empty():
            text = self.pieces.text_queue.get()
            if text and not self.begun:  # the end is told as None
                text = text.lstrip()
            if text:
                self.begun = True
                self.say(text)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> Tensor:
    """(1, T) of what the chat template makes of these messages, up to the answer's beginning."""
    for message in messages:
        _refuse_halves(message["content"])
    try:
        inputs = tokenizer.apply_chat_template(
            ChatRenderer(tokenizer).as_wanted(messages),
            add_generation_prompt=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},  # it would warn of a length that is refused here, in clearer words
        )
    except Exception as error:  # of any kind: a template is a program of the model's folder
        raise DataError(
            "The chat template refuses the conversation.",
            given=f"{', '.join(message['role'] for message in messages)} ({type(error).__name__}: {error})",
            fix="some templates take no system message",
        ) from None
    if not inputs["input_ids"]:
        raise DataError("The chat template makes nothing of the conversation.", fix="see chat_template.jinja")
    return torch.tensor([list(inputs["input_ids"])], dtype=torch.int64)


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """(1, T) of a text; of an empty one that which begins every text."""
    _refuse_halves(prompt)
    ids = prompt_ids(tokenizer, prompt)
    if not ids and tokenizer.bos_token_id is None:
        raise DataError("The prompt has no tokens.", given=repr(prompt), fix="write something")
    return torch.tensor([ids or [tokenizer.bos_token_id]], dtype=torch.int64)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that goes on: with what the tokenizer puts in front, and not with the EOS that some put behind,
    which in training stands behind the answer; and as there, with one BOS where the text has brought its own."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    ids = ids[: len(ids) - len(added_around(tokenizer)[1])]
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts in front of a text and behind it."""
    whole, bare = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (True, False))
    before = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[:before], whole[before + len(bare) :]


def _refuse_halves(text: str) -> None:
    """Refuse what no tokenizer takes; bytes of the command line that are not UTF-8 come in as such, too."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            "The prompt is not Unicode: half of a surrogate pair stands alone, or a byte that is not UTF-8.",
            given=ascii(text),
        ) from None


def _room(ids_1T: Tensor, positions: int, problem: str, fix: str) -> int:
    """Positions that these tokens leave for an answer; it is an error if there are none."""
    taken = ids_1T.shape[1]
    if taken >= positions:
        allowed = f"at most {positions - 1}, so that an answer has a position"
        raise DataError(problem, given=f"{taken} tokens", allowed=allowed, fix=fix)
    return positions - taken


def _learned_positions(model: Any) -> int:
    """Positions behind which the model computes nothing; without bound where they are no table."""
    inner = getattr(model, "base_model", model)
    return _positions(model) if has_position_table(inner) else 1 << 40


def _positions(model: Any) -> int:
    """Positions for text that the model was made for; without bound where its config names none."""
    known = positions_of(model.config) or 1 << 40
    # a prompt that was learnt (peft's prompt, prefix and P-tuning) stands before the text
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    return known - int(virtual)


def _ended(
    ends: Collection[int], new_N: Tensor, stopped: bool, asked: int, room: int
) -> Literal["end", "length", "positions", "stopped"]:
    if len(new_N) and int(new_N[-1]) in ends:
        return "end"
    if stopped:
        return "stopped"
    return "positions" if room < asked and len(new_N) == room else "length"


@contextmanager
def _sampled(model: Any, seed: int) -> Iterator[None]:
    """Within it the model answers, with random numbers of its own; its mode is put back."""
    cards = [model.device] if model.device.type == "cuda" else []
    eager = model.device.type == "cpu" and causal_model(model).config._attn_implementation == "eager"
    attending = SingleQueries() if eager else nullcontext()  # type: ignore[no-untyped-call]
    no_grad = torch.no_grad()  # what a later step may use, too
    with evaluating(model), torch.random.fork_rng(devices=cards), no_grad, attending:
        torch.manual_seed(seed)
        yield


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    say: Callable[[str], None] | None,
    *,
    raw: bool,
) -> str:
    if tokenizer.chat_template and not raw:
        ids_1T = _rendered(tokenizer, [{"role": "user", "content": prompt}])
    else:
        ids_1T = _tokens(tokenizer, prompt)
    positions = _learned_positions(model)
    room = _room(ids_1T, positions, "The prompt is longer than the model has positions for.", "write less")
    new = min(sampling.max_new_tokens, room)
    streamer = None if say is None else _Told(tokenizer, say)
    ends = answer_ends(tokenizer)
    new_N = _continued(model, tokenizer, ids_1T.to(model.device), new, sampling, ends=ends, streamer=streamer)
    text: str = tokenizer.decode(new_N, skip_special_tokens=True)
    return text.strip()


def _continued(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids_1T: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    ends: Sequence[int],
    **options: Any,
) -> Tensor:
    """The ids that `model` puts behind `ids_1T`, (N,). Raises DataError for ids that it does not know."""
    check_ids(int(ids_1T.max()), tokenizer, model.config)
    causal = causal_model(model)
    theirs: GenerationConfig = causal.generation_config
    pad = tokenizer.pad_token_id
    ours = GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=list(dict.fromkeys([*known_ends(theirs), *ends])) or None,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        use_cache=keeps_cache(model),
        **sampling.options(),
    )
    causal.generation_config = ours  # or transformers would take from it what ours leaves open
    # a learnt prefix comes in as a cache, which some models return, whatever they are told
    hook = None if ours.use_cache else causal.register_forward_hook(lambda *it: CausalLMOutput(logits=it[-1].logits))
    try:
        output = model.generate(
            input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=ours, **options
        )
    finally:
        causal.generation_config = theirs
        if hook is not None:
            hook.remove()
    new_N: Tensor = output[0, ids_1T.shape[1] :]
    return new_N


def keeps_cache(model: Any) -> bool:
    """Whether keys and values are kept from token to token.

    Not under a prompt that was learnt: peft 0.21 looks for them where transformers 5.24 has them no more, and would put
    the prompt before each token anew.
    """
    return not getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
