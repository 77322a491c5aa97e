"""Pydantic models of the API: requests and responses of chat completions, files and models, as OpenAI's.

A field that is not listed here is refused. Fields that this server does not support are listed with the
values that change nothing (`_only`); any other value is refused with a message.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from encoder.selection import Selector

MODEL = "fluxchat"
MAX_MEDIA = 16  # videos and images in one request
MAX_MESSAGES = 1024
MAX_EMBEDDED = 1024  # texts and clips in one request for features
MAX_STOPS = 4
MAX_IDS = 1024  # of stop_token_ids and logit_bias
# Prefix of the tags of union alternatives, which distinguishes them from fields in the path of an error.
ALTERNATIVE = "="


class Strict(BaseModel):
    """Base model: no unknown fields and no conversions; neither true nor "1" is a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _neutral(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[info.field_name or ""].json_schema_extra
        allowed = extra.get("enum") if isinstance(extra, dict) else None
        if not isinstance(allowed, list) or any(_same(value, neutral) for neutral in allowed):
            return value
        values = " or ".join(json.dumps(neutral) for neutral in allowed[1:])
        advice = f"leave it out or send {values}" if values else "leave it out"
        raise PydanticCustomError("unsupported", "{advice}", {"advice": advice})


def _kind(value: Any) -> str:
    """The tag of a JSON value's kind."""
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "boolean"),
        (str, "text"),
        (list, "list"),
        (dict, "object"),
        (int, "number"),
        (float, "number"),
    )
    return ALTERNATIVE + next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _by(name: str) -> Discriminator:
    """Alternatives that differ by the value of one field."""

    def of(value: Any) -> str | None:
        tag = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        return ALTERNATIVE + tag if isinstance(tag, str) else None

    return Discriminator(of)


def _only(*values: Any) -> Any:
    """A field of which this server takes only the values that change nothing; null always."""
    return Field(default=None, json_schema_extra={"enum": [None, *values]})


def _same(left: Any, right: Any) -> bool:
    return isinstance(left, bool) is isinstance(right, bool) and bool(left == right)


def _list_of_one(value: Any) -> Any:
    """A text as the list that it stands for."""
    return [value] if isinstance(value, str) else value


Flag = bool | None
Hint = Annotated[str, Field(max_length=1024)] | None  # for the operator; changes no answer
Text = Annotated[str, Field(max_length=4 * 2**20)]


# -- parts of a message -------------------------------------------------------------------------------------


class TextPart(Strict):
    """Text. (input_text and output_text are the names of OpenAI's Responses.)"""

    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: Any = _only([])
    logprobs: Any = _only([])


class RefusalPart(Strict):
    """A refusal of the assistant, as OpenAI's clients send it back."""

    type: Literal["refusal"]
    refusal: Text


class Url(Strict):
    """Where a video or image is: a data: URL, the id of an uploaded file, an allowed address or path."""

    url: Annotated[str, Field(min_length=1)]
    detail: Any = _only("auto")


Place = Annotated[
    Annotated[str, Field(min_length=1), Tag("=text")] | Annotated[Url, Tag("=object")], Discriminator(_kind)
]


Moment = Annotated[
    Annotated[float, Field(ge=0), Tag("=number")]
    | Annotated[str, Field(min_length=1, max_length=32), Tag("=text")]
    | Annotated[None, Tag("=null")],
    Discriminator(_kind),
]
_REGION = "The box to look at: left, top, right, bottom as fractions of the upright picture."
Region = Annotated[
    Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=4, max_length=4)] | None,
    Field(description=_REGION),
]


class Excerpt(Strict):
    """What of a medium is looked at; all of it by default."""

    start: Annotated[Moment, Field(description="From here on: seconds, or '1:02' or '1:23:45.5'.")] = None
    end: Annotated[Moment, Field(description="Up to here.")] = None
    region: Region = None


class VideoPart(Excerpt):
    """A video."""

    type: Literal["video_url"]
    video_url: Place


class ImagePart(Excerpt):
    """An image."""

    type: Literal["image_url"]
    image_url: Place


class InputVideoPart(Excerpt):
    """A video, in the manner of OpenAI's Responses; one of the three says where it is."""

    type: Literal["input_video"]
    video_url: Place | None = None
    input_video: Place | None = None
    file_id: Annotated[str, Field(min_length=1)] | None = None
    detail: Any = _only("auto")


class InputImagePart(Excerpt):
    """An image of OpenAI's Responses; one of the three says where it is."""

    type: Literal["input_image"]
    image_url: Place | None = None
    input_image: Place | None = None
    file_id: Annotated[str, Field(min_length=1)] | None = None
    detail: Any = _only("auto")


class File(Strict):
    """An uploaded file, or one in the request: a data: URL or base64 alone."""

    file_id: Annotated[str, Field(min_length=1)] | None = None
    file_data: Annotated[str, Field(min_length=1)] | None = None
    filename: Annotated[str, Field(max_length=1024)] | None = None


class FilePart(Excerpt):
    """A video or image as a file."""

    type: Literal["file"]
    file: File


class InputFilePart(File, Excerpt):
    """The same in OpenAI's Responses."""

    type: Literal["input_file"]
    file_url: Annotated[str, Field(min_length=1)] | None = None


UserPart = Annotated[
    Annotated[TextPart, Tag("=text")]
    | Annotated[TextPart, Tag("=input_text")]
    | Annotated[VideoPart, Tag("=video_url")]
    | Annotated[ImagePart, Tag("=image_url")]
    | Annotated[InputVideoPart, Tag("=input_video")]
    | Annotated[InputImagePart, Tag("=input_image")]
    | Annotated[FilePart, Tag("=file")]
    | Annotated[InputFilePart, Tag("=input_file")],
    _by("type"),
]
AnswerPart = Annotated[
    Annotated[TextPart, Tag("=text")]
    | Annotated[TextPart, Tag("=input_text")]
    | Annotated[TextPart, Tag("=output_text")]
    | Annotated[RefusalPart, Tag("=refusal")],
    _by("type"),
]
UserContent = Annotated[
    Annotated[Text, Tag("=text")] | Annotated[list[UserPart], Field(min_length=1), Tag("=list")],
    Discriminator(_kind),
]
TextContent = Annotated[
    Annotated[Text, Tag("=text")] | Annotated[list[AnswerPart], Field(min_length=1), Tag("=list")],
    Discriminator(_kind),
]


# -- messages -----------------------------------------------------------------------------------------------


class SystemMessage(Strict):
    """How to answer."""

    role: Literal["system", "developer"]
    content: TextContent
    name: Any = _only()


class UserMessage(Strict):
    """Text, videos and images, in this order."""

    role: Literal["user"]
    content: UserContent
    name: Any = _only()


class AssistantMessage(Strict):
    """An earlier answer, as this server or OpenAI's clients give it."""

    role: Literal["assistant"]
    content: TextContent
    name: Any = _only()
    refusal: Any = _only()
    audio: Any = _only()
    annotations: Any = _only([])
    tool_calls: Any = _only([])
    function_call: Any = _only()
    reasoning_content: Text | None = None  # what was thought before it, which no later question is asked with
    reasoning: Text | None = None


AnyMessage = Annotated[
    Annotated[SystemMessage, Tag("=system")]
    | Annotated[SystemMessage, Tag("=developer")]
    | Annotated[UserMessage, Tag("=user")]
    | Annotated[AssistantMessage, Tag("=assistant")],
    _by("role"),
]


# -- the request --------------------------------------------------------------------------------------------


class TemplateOptions(Strict):
    """Of the chat template, as vLLM has them: whether a model that can think before it answers does."""

    enable_thinking: Flag = None
    thinking: Flag = None  # the name that some templates have for it


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: Flag = False
    include_obfuscation: Flag = None  # padding of events against traffic analysis; none is added
    continuous_usage_stats: Any = _only(False)


class AnyText(Strict):
    """Words, as the model likes."""

    type: Literal["text"]


class AnyJson(Strict):
    """An object of JSON."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON Schema. It is always enforced, whatever strict says."""

    name: Annotated[str, Field(max_length=256)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Flag = None


class SchemaJson(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    Annotated[AnyText, Tag("=text")]
    | Annotated[AnyJson, Tag("=json_object")]
    | Annotated[SchemaJson, Tag("=json_schema")],
    _by("type"),
]


def _top_k(value: Any) -> Any:
    return 0 if value == -1 and _same(value, -1) else value  # vLLM's "off"


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
BiasId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
TokenBudget = Annotated[
    Annotated[int, Field(ge=1, lt=2**31), Tag("=number")]
    | Annotated[str, Field(max_length=64), Tag("=text")]
    | Annotated[None, Tag("=null")],
    Discriminator(_kind),
]


class ChatBody(Strict):
    """A question with its conversation. Beside OpenAI's fields: token_budget, selector, vLLM's sampling."""

    model: str = MODEL
    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=MAX_MESSAGES)]

    # What is looked at.
    token_budget: Annotated[
        TokenBudget,
        Field(description="Visual tokens per video: a number, 'full', 'auto' or 'auto:SECONDS'."),
    ] = None
    selector: Selector | None = None
    start: Annotated[
        Moment, Field(description="Of every video without one of its own: seconds, or '1:02' or '1:23:45.5'.")
    ] = None
    end: Annotated[Moment, Field(description="Of every video without one of its own.")] = None
    region: Region = None
    parts: Annotated[
        Flag, Field(description="false: a video of ten minutes or more is looked at as one, not in parts.")
    ] = None

    # How the answer is drawn. temperature 0 (the default) is greedy.
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[
        Annotated[int, Field(ge=0, lt=2**31)] | None,
        BeforeValidator(_top_k),
        Field(description="0 or -1 is off."),
    ] = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logit_bias: Annotated[dict[BiasId, Bias], Field(max_length=MAX_IDS)] | None = None

    # What is thought before it.
    chat_template_kwargs: TemplateOptions | None = None
    thinking_token_budget: Annotated[
        Annotated[int, Field(ge=0, lt=2**31)] | None,
        Field(description="Most tokens of thoughts, beside those of the answer."),
    ] = None
    include_reasoning: Annotated[
        Flag, Field(description="false: thoughts are not sent (reasoning_content).")
    ] = None

    # When it ends.
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: Annotated[
        Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=MAX_STOPS)]
        | None,
        BeforeValidator(_list_of_one),
        Field(description="A text, or a list of texts, that ends the answer and is no part of it."),
    ] = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_IDS)] | None = None

    # What form it has.
    response_format: Annotated[
        ResponseFormat | None,
        Field(description="text, json_object, or json_schema: JSON by a schema, unless it is cut off."),
    ] = None

    # How it is sent.
    stream: Flag = False
    stream_options: StreamOptions | None = None

    # Labels, which change no answer. user and cache_salt set apart what is kept for follow-up questions.
    user: Hint = None
    cache_salt: Hint = None
    safety_identifier: Hint = None
    prompt_cache_key: Hint = None
    prompt_cache_retention: Hint = None
    request_id: Hint = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: Flag = None  # there are no tools

    # OpenAI's, and vLLM's, at the values that change nothing.
    n: Any = _only(1)
    best_of: Any = _only(1)
    logprobs: Any = _only(False)
    top_logprobs: Any = _only(0)
    prompt_logprobs: Any = _only()
    presence_penalty: Any = _only(0)
    frequency_penalty: Any = _only(0)
    tools: Any = _only([])
    tool_choice: Any = _only("none", "auto")
    functions: Any = _only([])
    function_call: Any = _only("none", "auto")
    modalities: Any = _only(["text"])
    audio: Any = _only()
    prediction: Any = _only()
    reasoning_effort: Any = _only("none")
    verbosity: Any = _only("medium")
    web_search_options: Any = _only()
    store: Any = _only(False)
    service_tier: Any = _only("auto", "default")
    echo: Any = _only(False)
    ignore_eos: Any = _only(False)
    use_beam_search: Any = _only(False)
    length_penalty: Any = _only(1)
    include_stop_str_in_output: Any = _only(False)
    skip_special_tokens: Any = _only(True)
    spaces_between_special_tokens: Any = _only(True)
    add_generation_prompt: Any = _only(True)
    continue_final_message: Any = _only(False)
    add_special_tokens: Any = _only(False)
    truncate_prompt_tokens: Any = _only()
    allowed_token_ids: Any = _only()
    bad_words: Any = _only([])
    documents: Any = _only([])
    chat_template: Any = _only()
    mm_processor_kwargs: Any = _only({})
    guided_json: Any = _only()
    guided_regex: Any = _only()
    guided_choice: Any = _only()
    guided_grammar: Any = _only()
    structured_outputs: Any = _only()
    logits_processors: Any = _only([])
    priority: Any = _only(0)


_Input = Annotated[
    Annotated[str, Field(min_length=1, max_length=1 << 20), Tag("=text")]
    | Annotated[UserPart, Tag("=object")],
    Discriminator(_kind),
]


def _list_of_item(value: Any) -> Any:
    """A text or a part as the list that it stands for."""
    return [value] if isinstance(value, (str, dict)) else value


class EmbeddingsBody(Strict):
    """A request for features of texts and clips, in one space: their cosine says how well they fit."""

    model: str = MODEL
    input: Annotated[
        list[_Input],
        Field(
            min_length=1,
            max_length=MAX_EMBEDDED,
            description="Texts, and parts as a message has them: {'type': 'video_url', ...}, start and end.",
        ),
        BeforeValidator(_list_of_item),
    ]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Any = _only()
    user: Hint = None


class FilesQuery(BaseModel):
    """The query of GET /v1/files: which of the caller's files, newest first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


# -- what the server sends ----------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    """message: one sentence. param: the field it is about, as a path. code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class FileObject(BaseModel):
    """An uploaded file. created_at: seconds since 1970. media: its kind, size and codec, when it comes."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str = "user_data"
    status: str = "processed"
    media: dict[str, Any] | None = None


class FileList(BaseModel):
    """The caller's files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    """What was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ModelObject(BaseModel):
    """The model. default_token_budget: visual tokens of a video when a request does not say."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    description: str
    default_token_budget: int


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: str | None = None
    refusal: None = None


class Choice(BaseModel):
    """The one answer. finish_reason: "length" when max_tokens ended it."""

    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Embedding(BaseModel):
    """A unit vector: numbers, or base64 of them as little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """The features in the order of the input. usage: prompt_tokens counts those of the texts."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: dict[str, int]


class ChatCompletion(BaseModel):
    """An answer; streamed, it comes as server-sent events chat.completion.chunk, the last one [DONE]."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: dict[str, Any]
    timings: dict[str, float]
