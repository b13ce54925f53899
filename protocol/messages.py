"""Everything that processes say to each other, named by direction.

Rules: fields are only appended and have defaults from then on; a tag is never reused; every message has golden bytes
in a test. Arrays are numpy arrays of the stated dtype; the codec sends large ones as frames of their own.

Tags: 1-19 coordinator to worker, 20-39 worker to coordinator, 40-69 client to coordinator, 70-99 coordinator to
client, 100-119 supervisor and coordinator.
"""

from __future__ import annotations

from typing import Any, NewType, TypeAlias

import msgspec
import numpy as np

from drumline.protocol.errors import ErrorInfo
from drumline.protocol.layout import Layout

PROTOCOL_VERSION = 1

Rank = NewType("Rank", int)
Term = NewType("Term", int)
Epoch = NewType("Epoch", int)
Wave = NewType("Wave", int)
StepId = NewType("StepId", int)
RequestId = NewType("RequestId", str)

I32: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]
F32: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
I32Matrix: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.int32]]


class Part(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A struct that travels inside messages."""


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False, tag_field="type"):
    """Base of every message."""


# --------------------------------------------------------------------------------------------------- shared parts


class SamplingSpec(Part, frozen=True):
    """What a worker needs to sample one sequence. The meaning and the defaults of the names are vLLM's.

    ``seed`` is always set (drawn at acceptance when the user gave none). ``stop_token_ids`` holds every token id that
    the engine stops at, EOS included unless ``ignore_eos``; workers mask them while fewer than ``min_tokens`` tokens
    have been generated. ``logprobs`` is -1 for none, else how many of the best to return beside the sampled one.
    """

    seed: int = 0
    index: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = -1


class Admit(Part, frozen=True):
    """One row that enters a replica's batch table, replacing whatever the row held.

    ``tokens``: int32 (length,), prompt and the tokens generated so far. ``prompt_len``: length of the original prompt.
    ``num_cached``: leading tokens whose KV is in ``blocks`` already. ``blocks``: int32, block ids of the replica.
    ``lane``: in whose steps the row computes, 0 to pp_size - 1.
    """

    row: int
    tokens: I32
    prompt_len: int
    num_cached: int
    blocks: I32
    sampling: SamplingSpec
    lane: int = 0


class Member(Part, frozen=True):
    """One rank of an epoch."""

    rank: int
    incarnation: str


class LogprobEntry(Part, frozen=True):
    """Log probabilities at one sampled position: of the sampled token, its rank (1 is best) and the best few."""

    token: int
    logprob: float
    rank: int
    top_tokens: I32
    top_logprobs: F32


class WorkerConfig(Part, frozen=True):
    """All that a rank must know before it is configured; its digest is compared in the handshake.

    ``kv_cache_dtype``: auto is the model's. ``worker_cls``: auto, or module.Class. ``distributed_timeout_s``: deadline
    of a collective. ``max_parallel_loading_workers``: how many ranks of a host load at once, 0 for all, agreed on by
    lock files in ``runtime_dir``. The first rank that its host starts, ``first_local_rank``, takes device number
    ``first_local_device``, the next ones those that follow.
    """

    model: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    kv_cache_memory_bytes: int
    gpu_memory_utilization: float
    data_parallel_size: int
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enable_expert_parallel: bool = False
    expert_placement_strategy: str = "linear"
    seed: int = 0
    local_ranks: int = 1
    num_threads: int = 0
    fault_injection: bool = False
    beat_interval_s: float = 1.0
    attention_data_parallel_size: int = 1
    pipeline_partition: tuple[int, ...] = ()
    all2all_backend: str = "allgather_reducescatter"
    kv_cache_dtype: str = "auto"
    worker_cls: str = "auto"
    worker_extension_cls: str = ""
    distributed_timeout_s: float = 120.0
    max_parallel_loading_workers: int = 0
    runtime_dir: str = ""
    first_local_rank: int = 0
    first_local_device: int = 0

    @property
    def layout(self) -> Layout:
        """The layout of the world that the rank is part of."""
        return Layout(
            self.data_parallel_size,
            self.pipeline_parallel_size,
            self.tensor_parallel_size,
            self.enable_expert_parallel,
            self.attention_data_parallel_size,
            self.pipeline_partition,
        )


# ------------------------------------------------------------------------------------------- coordinator to worker


class WelcomeWorker(Message, frozen=True, tag=1):
    """Answer to a worker's Hello. ``digest`` is that of ``config``; the worker computes its own, says it in Ready."""

    version: int
    term: int
    digest: str
    config: WorkerConfig


class OpenStore(Message, frozen=True, tag=2):
    """Open the epoch's TCPStore on ``host`` (an explicit address) at ``port`` (0: any free one), bound before its port
    is told."""

    term: int
    epoch: int
    host: str
    port: int = 0


class Configure(Message, frozen=True, tag=3):
    """Form an epoch. ``placement``: int32 (moe_layers, physical slots), the logical expert of each slot, or (0, 0)."""

    term: int
    epoch: int
    role: str
    members: tuple[Member, ...]
    store_host: str
    store_port: int
    placement: I32Matrix


class Step(Message, frozen=True, tag=4):
    """One forward pass of one replica, as a difference against its batch table.

    Applied in this order: ``evicted`` rows leave; ``admitted`` rows enter; ``append_blocks[i]`` is appended to row
    ``append_rows[i]`` (in order, a row may stand there more than once); then each row of ``prefill_rows`` computes
    ``prefill_counts`` tokens, every other row that decodes computes one, and the rest compute none.

    A row holds ``length`` known tokens of which ``computed`` are in the KV cache. When a row's computed reaches its
    length, one token is sampled and length grows by one. A row decodes when computed == length - 1 and it has
    sampled since it was admitted; rows that are still in prefill compute only when named.
    ``num_tokens_across_dp``: int32 (attention replicas of the group,), tokens that each replica computes in this step;
    a replica with 0 runs a dummy step. ``lane``: only rows of this lane compute, named or not.
    """

    term: int
    epoch: int
    wave: int
    step: int
    num_tokens_across_dp: I32
    evicted: I32
    admitted: tuple[Admit, ...]
    append_rows: I32
    append_blocks: I32
    prefill_rows: I32
    prefill_counts: I32
    lane: int = 0


CONTROL_METHODS = ("ping", "stats")
"""Control calls that a rank's control thread answers while a step runs; all others run between steps."""


class Call(Message, frozen=True, tag=5):
    """A control call to one rank. ``args``: msgpack of (positional arguments, arguments by name), or nothing."""

    term: int
    epoch: int
    call_id: int
    method: str
    args: bytes = b""


class Shutdown(Message, frozen=True, tag=6):
    """End cleanly, exit status 0; ``reason`` is for the log."""

    term: int
    reason: str = ""


ToWorker = WelcomeWorker | OpenStore | Configure | Step | Call | Shutdown


# ------------------------------------------------------------------------------------------- worker to coordinator


class HelloWorker(Message, frozen=True, tag=20):
    """The first message of a rank. ``token`` is its launch token, ``incarnation`` a uuid drawn by the process."""

    version: int
    token: str
    rank: int
    incarnation: str
    pid: int
    host: str


class StoreReady(Message, frozen=True, tag=21):
    """The epoch's store listens at ``host``:``port``."""

    term: int
    epoch: int
    rank: int
    host: str
    port: int


class Ready(Message, frozen=True, tag=22):
    """The model is loaded, the KV cache allocated, the epoch's groups formed. ``device``: cpu or cuda."""

    term: int
    epoch: int
    rank: int
    digest: str
    num_blocks: int
    block_bytes: int
    weight_bytes: int
    load_s: float
    device: str = ""


class StepDone(Message, frozen=True, tag=23):
    """``tokens``: int32, the token sampled by each row that sampled in this step, in ascending row order. Only the
    first rank of the last stage of an attention replica sends them; from all others it is empty, an acknowledgement.

    ``logprobs``: entries for those of them that asked, with ``logprob_index`` (int32) their place in ``tokens``.
    """

    term: int
    epoch: int
    rank: int
    step: int
    tokens: I32
    logprob_index: I32
    logprobs: tuple[LogprobEntry, ...] = ()


class Fault(Message, frozen=True, tag=24):
    """Something failed on the rank; it has left the epoch and stays, unless ``error`` says that it could not load."""

    term: int
    epoch: int
    rank: int
    error: ErrorInfo


class CallResult(Message, frozen=True, tag=25):
    """``value`` is msgpack."""

    term: int
    epoch: int
    call_id: int
    rank: int
    ok: bool
    value: bytes = b""
    error: ErrorInfo | None = None


class BeatWorker(Message, frozen=True, tag=26):
    """Progress: the step that runs or ran last, how many collectives it has entered, whether it is inside one.

    ``load_done`` and ``load_total`` are bytes of weights, while the rank loads.
    """

    term: int
    epoch: int
    rank: int
    step: int
    collective: int
    inside: bool
    load_done: int = 0
    load_total: int = 0


FromWorker = HelloWorker | StoreReady | Ready | StepDone | Fault | CallResult | BeatWorker


# ------------------------------------------------------------------------------------------- client to coordinator


class HelloClient(Message, frozen=True, tag=40):
    """The first message of a client. ``client_id`` is a uuid drawn by the connection."""

    version: int
    client_id: str


class Submit(Message, frozen=True, tag=41):
    """``prompt``: int32 (length,). ``sampling.stop_token_ids`` holds only the user's; the coordinator adds EOS.

    ``seed_given`` false: the coordinator draws one. ``n`` sequences are made, with index 0 to n - 1.
    """

    call_id: int
    request_id: str
    prompt: I32
    sampling: SamplingSpec
    max_tokens: int
    n: int = 1
    seed_given: bool = False
    ignore_eos: bool = False
    priority: int = 0
    data_parallel_rank: int = -1


class Stop(Message, frozen=True, tag=42):
    """A stop string matched in the text of the first ``num_tokens`` tokens: compute no further."""

    request_id: str
    index: int
    num_tokens: int


class Cancel(Message, frozen=True, tag=43):
    """End all sequences of a request. Answered by Cancelled, also when it has ended already."""

    call_id: int
    request_id: str


class Ack(Message, frozen=True, tag=44):
    """Every frame up to ``frame`` has been read."""

    frame: int


class Resume(Message, frozen=True, tag=45):
    """Deliver from ``positions[index]`` on."""

    call_id: int
    request_id: str
    positions: tuple[int, ...]


class StatusQuery(Message, frozen=True, tag=46):
    """Answered by StatusReport."""

    call_id: int


class CallRanks(Message, frozen=True, tag=47):
    """Run a control call on every rank."""

    call_id: int
    method: str
    args: bytes = b""
    timeout_s: float = 5.0


class BeatClient(Message, frozen=True, tag=48):
    """Still here. A client that has sent one must go on sending them."""

    client_id: str


class Goodbye(Message, frozen=True, tag=49):
    """The client leaves; its requests are cancelled."""

    client_id: str


class LayoutQuery(Message, frozen=True, tag=50):
    """Which rank holds what. Answered by LayoutFacts."""

    call_id: int


FromClient = (
    HelloClient | Submit | Stop | Cancel | Ack | Resume | StatusQuery | CallRanks | BeatClient | Goodbye | LayoutQuery
)


# ------------------------------------------------------------------------------------------- coordinator to client


class ModelInfo(Part, frozen=True):
    """What a client library must know of the model that is served. Sent once the engine is ready."""

    model: str
    served_model_name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    data_parallel_size: int
    max_prompt_tokens: int
    has_tokenizer: bool
    block_size: int = 16


class WelcomeClient(Message, frozen=True, tag=70):
    """The engine is ready. ``tokenizer``: the bytes of tokenizer.json, empty where there is none."""

    version: int
    term: int
    digest: str
    info: ModelInfo
    tokenizer: bytes


class Accepted(Message, frozen=True, tag=71):
    """``handles``: int32 (n,), the stream handle of each index, on this connection and in this term."""

    call_id: int
    request_id: str
    handles: I32
    seed: int
    num_cached_tokens: int = 0


class Rejected(Message, frozen=True, tag=72):
    """A Submit, Resume or CallRanks was refused and has changed nothing."""

    call_id: int
    request_id: str
    error: ErrorInfo


class Tokens(Message, frozen=True, tag=73):
    """The new tokens of one step. Entry i: stream ``handles[i]``, its output position ``positions[i]`` (0 is the first
    generated token), token ``tokens[i]``; all int32 (entries,). ``logprobs`` as in StepDone, by entry."""

    frame: int
    handles: I32
    positions: I32
    tokens: I32
    logprob_index: I32
    logprobs: tuple[LogprobEntry, ...] = ()


class StreamEnd(Part, frozen=True):
    """``reason``: stop, length or abort. ``stop_token`` is -1 unless a stop token id ended it. ``num_tokens`` counts
    generated tokens, the stop token included. ``num_cached_tokens``: prompt tokens taken from the prefix cache."""

    handle: int
    request_id: str
    index: int
    reason: str
    stop_token: int
    num_tokens: int
    num_cached_tokens: int = 0


class Finished(Message, frozen=True, tag=74):
    """Sequences that have ended; their tokens were in earlier frames."""

    frame: int
    ends: tuple[StreamEnd, ...]


class Cancelled(Message, frozen=True, tag=75):
    """The request's rows are free: no step in flight computes them and their blocks are back in the pool."""

    call_id: int
    request_id: str


class Failed(Message, frozen=True, tag=76):
    """One request failed, or (``request_id`` empty) the engine did and every request with it."""

    request_id: str
    error: ErrorInfo


class StatusReport(Message, frozen=True, tag=77):
    """``status``: the JSON of :class:`EngineStatus`."""

    call_id: int
    status: bytes


class Event(Message, frozen=True, tag=78):
    """Something worth telling: ``kind`` is starting, waiting (for ranks that somebody else starts), loading, ready,
    warning, fault, closing."""

    kind: str
    text: str
    rank: int = -1
    done: int = 0
    total: int = 0


class RankAnswer(Part, frozen=True):
    """What one rank answered to a control call; ``value`` is msgpack, ``error`` is set where ``ok`` is false."""

    rank: int
    ok: bool
    value: bytes
    error: ErrorInfo | None = None


class CallRanksResult(Message, frozen=True, tag=79):
    """The answers by ascending rank."""

    call_id: int
    answers: tuple[RankAnswer, ...]


class Behind(Message, frozen=True, tag=80):
    """Frames were left out since ``frame`` because too many stood unacknowledged. Answer with Resume."""

    frame: int


class Resumed(Message, frozen=True, tag=81):
    """``tokens[index]``: int32, all generated tokens so far. ``ends`` holds the sequences that have ended."""

    call_id: int
    request_id: str
    prompt: I32
    handles: I32
    tokens: tuple[I32, ...]
    ends: tuple[StreamEnd, ...] = ()
    logprobs: tuple[tuple[LogprobEntry, ...], ...] = ()


class LayoutFacts(Message, frozen=True, tag=82):
    """What a report of the layout is made of. ``question``: JSON, the model's shape and the sizes. ``placement``: int32
    (moe_layers, physical slots), the logical expert of each slot, or (0, 0)."""

    call_id: int
    question: bytes
    placement: I32Matrix


ToClient = (
    WelcomeClient
    | Accepted
    | Rejected
    | Tokens
    | Finished
    | Cancelled
    | Failed
    | StatusReport
    | Event
    | CallRanksResult
    | Behind
    | Resumed
    | LayoutFacts
)


# ---------------------------------------------------------------------------------------- supervisor and coordinator


class HelloSupervisor(Message, frozen=True, tag=100):
    """The first message of the supervisor, with the token that the coordinator was started with."""

    version: int
    token: str
    pid: int


class Exited(Message, frozen=True, tag=101):
    """A worker process ended. ``code`` is its exit status, ``signal`` the signal that ended it or 0."""

    rank: int
    pid: int
    code: int
    signal: int
    stderr_tail: str = ""


class Spawned(Message, frozen=True, tag=102):
    """The process of a Spawn is running."""

    rank: int
    pid: int


class Spawn(Message, frozen=True, tag=103):
    """Start a worker for ``rank``; it shows ``token`` in its Hello."""

    rank: int
    token: str


class Kill(Message, frozen=True, tag=104):
    """Send SIGKILL to the worker ``pid``, if it is still the process of ``rank``."""

    rank: int
    pid: int


class Stopping(Message, frozen=True, tag=105):
    """Coordinator to supervisor: the engine ends; stop what you own. Supervisor to coordinator: end now."""

    reason: str
    error: ErrorInfo | None = None


class Beat(Message, frozen=True, tag=106):
    """From either side; nothing heard for the lifeline's time means gone."""

    pid: int


FromSupervisor = HelloSupervisor | Exited | Spawned | Stopping | Beat
ToSupervisor = Spawn | Kill | Stopping | Beat
FromWorkerSide = FromWorker | FromSupervisor
