"""The bodies of the replica's HTTP API: OpenAI's completions, and the weight-update routes.

Requests are decoded strictly: a field that this server does not implement is refused by name,
because ignoring it would quietly return other tokens than were asked for.

    body = decode(data, CompletionRequest)
    prompts = [...]                                      # body.prompts(), tokenized
    requests = body.generation_requests(prompts)         # one for each choice
    completion = CompletionBuilder(body, prompts, model_name)
    chunk = completion.add(index, token)                 # streaming: one token's chunk
    whole = completion.build()                           # or all of it, at the end
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from checkpoint_engine.errors import MALFORMED, UsageError
from checkpoint_engine.replica.sequence import (
    FinishReason,
    GenerationRequest,
    Token,
    WeightSpan,
    weight_spans,
)

__all__ = [
    "Choice",
    "CollectiveRpcRequest",
    "Completion",
    "CompletionBuilder",
    "CompletionRequest",
    "UpdateFromPathRequest",
    "UpdateWeightsRequest",
    "Usage",
    "decode",
]

MAX_NUM_CHOICES = 128

T = TypeVar("T")


def decode(data: bytes, body_type: type[T]) -> T:
    """Decode a JSON body.

    Raises:
        UsageError: in one line, what is wrong with it and where.
    """
    try:
        return msgspec.json.decode(data, type=body_type)
    except MALFORMED as error:
        said = " ".join(str(error).split())  # it may quote a name that has lines
        raise UsageError(f"malformed body: {said}") from error


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions. `return_token_ids` is not OpenAI's: vLLM has it too."""

    prompt: str | list[str | int | list[int]]
    model: str | None = None
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    return_token_ids: bool = False

    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts as texts or token ids: `prompt` is one of either, or a list of them.

        Raises:
            UsageError: `prompt` is empty or a list of both, or the choices are too many.
        """
        items = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        token_ids = tuple(item for item in items if isinstance(item, int))
        prompts = [
            item if isinstance(item, str) else tuple(item)
            for item in items
            if not isinstance(item, int)
        ]
        if bool(token_ids) == bool(prompts):
            raise UsageError(
                "prompt is a text, a list of token ids, or a list of such prompts; not empty"
            )
        if not 1 <= self.n * max(1, len(prompts)) <= MAX_NUM_CHOICES:
            raise UsageError(f"a request has 1 to {MAX_NUM_CHOICES} choices: n for each prompt")
        return [token_ids] if token_ids else prompts

    def generation_requests(self, prompts: list[tuple[int, ...]]) -> list[GenerationRequest]:
        """One for each choice, `n` for each prompt in turn; each choice has its own seed.

        Raises:
            UsageError: a value is out of range.
        """
        return [
            GenerationRequest(
                prompt_token_ids=prompt,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=None if self.seed is None else self.seed + choice,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            )
            for prompt in prompts
            for choice in range(self.n)
        ]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One generated text, or in a stream what one token added to it.

    Attributes:
        text: generated text, cut at the first stop string.
        finish_reason: None until the text has ended.
        weight_versions: spans over generated tokens. A whole choice has all of them, and so has
            the chunk that ends a stream; any other chunk has the span of its own token.
        token_ids: all generated tokens, including those whose text was cut, if asked for.
        prompt_token_ids: likewise; in a stream only the first chunk has them.
    """

    index: int
    text: str
    finish_reason: FinishReason | None
    weight_versions: tuple[WeightSpan, ...]
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a whole response; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The response, or one chunk of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType = UNSET


class CompletionBuilder:
    """Makes the response to one request from the tokens of its choices."""

    def __init__(
        self, body: CompletionRequest, prompts: list[tuple[int, ...]], model_name: str
    ) -> None:
        self._prompts = prompts
        self._num_choices = body.n
        self._return_token_ids = body.return_token_ids
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model_name = model_name
        self._tokens: list[list[Token]] = [[] for _ in range(len(prompts) * body.n)]

    def add(self, index: int, token: Token) -> Completion:
        """Take the next token of choice `index`; the return value is its chunk of the stream."""
        tokens = self._tokens[index]
        tokens.append(token)
        return self._completion([self._choice(index, first=len(tokens) - 1)])

    def build(self) -> Completion:
        """The whole response, once every choice has its last token."""
        num_prompt_tokens = sum(len(prompt) for prompt in self._prompts)
        num_tokens = sum(len(tokens) for tokens in self._tokens)
        usage = Usage(num_prompt_tokens, num_tokens, num_prompt_tokens + num_tokens)
        choices = [self._choice(index, first=0) for index in range(len(self._tokens))]
        return self._completion(choices, usage)

    def _completion(self, choices: list[Choice], usage: Usage | UnsetType = UNSET) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model_name,
            choices=choices,
            usage=usage,
        )

    def _choice(self, index: int, first: int) -> Choice:
        """Choice `index` from its token `first` on."""
        tokens = self._tokens[index][first:]
        finish_reason = tokens[-1].finish_reason
        spanned = first if finish_reason is None else 0
        versions = [token.version for token in self._tokens[index][spanned:]]
        with_prompt = self._return_token_ids and first == 0
        return Choice(
            index=index,
            text="".join(token.text for token in tokens),
            finish_reason=finish_reason,
            weight_versions=weight_spans(versions, spanned),
            token_ids=[token.token_id for token in tokens] if self._return_token_ids else UNSET,
            prompt_token_ids=self._prompts[index // self._num_choices] if with_prompt else UNSET,
        )


class UpdateWeightsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /update_weights_from_ipc, as SGLang has it: device uuid to control socket."""

    zmq_handles: dict[str, str]
    flush_cache: bool = True
    weight_version: str | None = None


class UpdateFromPathRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /update_weights_from_ckpt_engine; without a weight version, the path's last part."""

    model_path: Annotated[str, msgspec.Meta(min_length=1)]
    load_format: Literal["auto", "ckpt_engine"] = "auto"
    flush_cache: bool = True
    weight_version: str | None = None


class CollectiveRpcRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /collective_rpc, as vLLM has it.

    `timeout` is accepted and not used: the transaction has its own deadlines, and an answer
    before its end could not say which weights are served.
    """

    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    timeout: float | None = None

    def update(self) -> UpdateWeightsRequest:
        """The update that is asked for.

        Raises:
            UsageError: it asks for something else.
        """
        if self.method != "update_weights_from_ipc":
            raise UsageError(f"no method {self.method!r}; only 'update_weights_from_ipc'")
        if len(self.args) != 1 or self.kwargs:
            raise UsageError("args is [{device uuid: socket}] and kwargs is empty")
        try:
            return UpdateWeightsRequest(msgspec.convert(self.args[0], dict[str, str]))
        except msgspec.ValidationError as error:
            raise UsageError(f"args is [{{device uuid: socket}}]: {error}") from error
