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


NO_NUMBERS: I32 = np.zeros(0, dtype=np.int32)
NO_FETCHES: I32Matrix = np.zeros((0, 4), dtype=np.int32)
NO_MATRIX: I32Matrix = np.zeros((0, 0), dtype=np.int32)
for _array in (NO_NUMBERS, NO_FETCHES, NO_MATRIX):
    _array.setflags(write=False)


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
    ``first_local_device``, the next ones those that follow. ``coordinator_lease_s``: how long a rank that lost its
    coordinator keeps its weights and waits for the next one; 0: not at all.

    ``enable_eplb``: experts may move between steps, so that there is a staging buffer for each expert slot of a layer,
    and expert loads are counted. ``load_interval``: steps between two reports of them.
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
    coordinator_lease_s: float = 0.0
    enable_eplb: bool = False
    load_interval: int = 0

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


class Injection(Part, frozen=True):
    """A fault that a rank brings upon itself, once, when it comes to ``point``. Obeyed with ``fault_injection`` only.

    ``kind``: kill (SIGKILL to itself), stop (SIGSTOP; somebody else wakes it), exit (with status 1), segv, raise (an
    exception), nan (the logits of the first row), hang (the main thread, for good), slow (every step from then on takes
    ``factor`` times as long, for ``seconds``), none (takes back the one with this number). ``point``: now, loading,
    leave (coming out of the old epoch), regroup (while an epoch forms), joining (the same, in the first epoch of a
    process), idle, step, prefill, decode, staging (a part of an expert has just been started on its way), commit (a
    layer has just got its new experts). ``step``: the first step of its epoch that it may happen in, -1 for any.
    """

    number: int
    rank: int
    kind: str
    point: str = "now"
    step: int = -1
    seconds: float = 0.0
    factor: float = 1.0


class WelcomeWorker(Message, frozen=True, tag=1):
    """Answer to a worker's Hello. ``digest`` is that of ``config``; the worker computes its own, says it in Ready."""

    version: int
    term: int
    digest: str
    config: WorkerConfig
    injections: tuple[Injection, ...] = ()


class OpenStore(Message, frozen=True, tag=2):
    """Open the epoch's TCPStore on ``host`` (an explicit address) at ``port`` (0: any free one), bound before its port
    is told."""

    term: int
    epoch: int
    host: str
    port: int = 0


class Configure(Message, frozen=True, tag=3):
    """Form an epoch. ``placement``: int32 (moe_layers, physical slots), the logical expert of each slot, or (0, 0).

    ``role``: compute or parked. ``members`` are the ranks that compute, ascending: whole engine replicas, which form a
    layout of their own with so many of them; a rank's place among them is its rank in that layout. ``parked`` ranks
    keep their weights and give copies of experts to others. ``slots``: int32 (ep ranks,), how many slots each ep rank
    has; empty: shared out evenly. ``fetches``: int32 (n, 4), what is not in its slot yet: MoE layer, physical slot, the
    rank (of the whole world) that has a copy or -1 for the checkpoint, and the copy's slot there, counted among that
    rank's own. Ranks send and receive in this order. Every other slot keeps what it has. ``nodes``: int32 (members,),
    a number for the host of each; empty: all are on one.
    """

    term: int
    epoch: int
    role: str
    members: tuple[Member, ...]
    store_host: str
    store_port: int
    placement: I32Matrix
    parked: tuple[Member, ...] = ()
    slots: I32 = NO_NUMBERS
    fetches: I32Matrix = NO_FETCHES
    nodes: I32 = NO_NUMBERS


class Shuffle(Part, frozen=True):
    """What a step does beside its computing for the layer that is staged (see StageExperts), in this order, all before
    the model runs: with ``commit`` the layer gets its new experts; then parts ``first`` to ``end`` of the moves are
    started; then the moves of rounds ``home_first`` to ``home_end``, of a layer that all ranks have committed, are
    copied from the staging buffers, which are free from then on, to their slots."""

    generation: int
    commit: bool = False
    first: int = 0
    end: int = 0
    home_first: int = 0
    home_end: int = 0


class Step(Message, frozen=True, tag=4):
    """One forward pass of one replica, as a difference against its batch table.

    Applied in this order: ``evicted`` rows leave; ``admitted`` rows enter; ``append_blocks[i]`` is appended to row
    ``append_rows[i]`` (in order, a row may stand there more than once); then each row of ``prefill_rows`` computes
    ``prefill_counts`` tokens, every other row that decodes computes one, and the rest compute none.

    A row holds ``length`` known tokens of which ``computed`` are in the KV cache. When a row's computed reaches its
    length, one token is sampled and length grows by one. A row decodes when computed == length - 1 and it has
    sampled since it was admitted; rows that are still in prefill compute only when named.
    ``num_tokens_across_dp``: int32 (attention replicas of the group,), tokens that each replica computes in this step;
    a replica with 0 runs a dummy step. ``lane``: only rows of this lane compute, named or not. ``shuffle``: the same
    for all replicas.
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
    shuffle: Shuffle | None = None


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


class Leave(Message, frozen=True, tag=7):
    """Every epoch before this one is over: come out of it, whatever runs, and report with Left what is held."""

    term: int
    epoch: int


class Load(Message, frozen=True, tag=8):
    """Load the model. ``experts``: int32 (moe_layers, slots), the logical expert of each slot of this rank, or (0, 0)
    where every rank has all experts. ``num_blocks``: KV blocks to allocate, 0: as many as the configuration says."""

    term: int
    experts: I32Matrix
    num_blocks: int = 0


class Inject(Message, frozen=True, tag=9):
    """Faults that the rank brings upon itself from now on. ``injections`` replaces those that have not come yet."""

    term: int
    injections: tuple[Injection, ...]


class StageExperts(Message, frozen=True, tag=10):
    """One MoE layer is to get other experts. ``placement``: int32 (physical slots,), what it will hold.

    ``fetches``: int32 (n, 4) as in Configure, all of this layer, by what is in the slots now; none is from the
    checkpoint, and where the source is the receiver itself the copy is local. ``rounds``: int32 (rounds + 1,) bounds:
    in fetches ``rounds[r]`` to ``rounds[r + 1]`` no rank sends twice or receives twice. Each expert travels in
    ``parts``; part p of round r has the number r * parts + p, and Steps name ranges of them, in ascending order. Only
    the ranks of the layer's stage that compute take part; all of them get this before the first such Step.

    ``generation`` tells stages apart, ascending within a term. When all parts have come a rank says Staged, and only
    when all have does a Step commit. When every rank has answered that Step its staging buffers go home, and the next
    layer may be staged.
    """

    term: int
    epoch: int
    generation: int
    layer: int
    placement: I32
    fetches: I32Matrix
    rounds: I32
    parts: int = 1


class CancelStage(Message, frozen=True, tag=11):
    """The stage is given up; none of its parts is started any more and no Step has committed it. When those that have
    been started are through, the rank says Staged with ``dropped``."""

    term: int
    epoch: int
    generation: int


ToWorker = (
    WelcomeWorker | OpenStore | Configure | Step | Call | Shutdown | Leave | Load | Inject | StageExperts | CancelStage
)


# ------------------------------------------------------------------------------------------- worker to coordinator


class HelloWorker(Message, frozen=True, tag=20):
    """The first message of a rank. ``token`` is its launch token, ``incarnation`` a uuid drawn by the process.

    To a coordinator that follows another one also ``term`` and ``epoch``, the newest that it has seen, whether it has
    ``loaded`` its weights, and the ``digest`` of the configuration that it has.
    """

    version: int
    token: str
    rank: int
    incarnation: str
    pid: int
    host: str
    term: int = 0
    epoch: int = 0
    loaded: bool = False
    digest: str = ""


class StoreReady(Message, frozen=True, tag=21):
    """The epoch's store listens at ``host``:``port``."""

    term: int
    epoch: int
    rank: int
    host: str
    port: int


class Ready(Message, frozen=True, tag=22):
    """The experts are in place, the epoch's groups formed. ``device``: cpu or cuda."""

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

    ``load``: int32 (moe layers of the stage, slots of the rank), how many tokens each of its expert slots has computed
    since the report before (or the epoch began), up to this step and without it, before its commit; (0, 0): no report.
    There is one every ``load_interval`` steps and in every step that commits. ``load_steps``: steps with tokens that it
    covers.
    """

    term: int
    epoch: int
    rank: int
    step: int
    tokens: I32
    logprob_index: I32
    logprobs: tuple[LogprobEntry, ...] = ()
    load: I32Matrix = NO_MATRIX
    load_steps: int = 0


class Fault(Message, frozen=True, tag=24):
    """Something failed on the rank; it has left the epoch and stays, unless ``error`` says that it could not load.

    ``rows``: with kind numeric, the rows of the batch table whose numbers are not finite."""

    term: int
    epoch: int
    rank: int
    error: ErrorInfo
    rows: tuple[int, ...] = ()


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

    ``load_done`` and ``load_total`` are bytes of weights, while the rank loads. ``lease_s``: how long the step that
    runs may take from now on, whatever recent ones took; 0.0: no longer than those. It counts while the rank is not
    ``inside`` a collective, where it waits for others.
    """

    term: int
    epoch: int
    rank: int
    step: int
    collective: int
    inside: bool
    load_done: int = 0
    load_total: int = 0
    lease_s: float = 0.0


class Loaded(Message, frozen=True, tag=27):
    """The model is loaded and the KV cache allocated. ``free_bytes``: memory that is left on the device (CPU: of the
    host) for more."""

    term: int
    rank: int
    digest: str
    num_blocks: int
    block_bytes: int
    weight_bytes: int
    load_s: float
    device: str
    free_bytes: int = 0


class Left(Message, frozen=True, tag=28):
    """The rank is out of every epoch before this one, and its device idle. ``held``: int32 (moe_layers, slots), the
    logical expert in each of its slots, -1 for none (and in layers of other stages), or (0, 0) where every rank has
    all experts. ``free_bytes`` as in Loaded. The last ``spare`` slots are staging buffers or what they took the place
    of: they can be copied from in the next Configure, and are gone after it."""

    term: int
    epoch: int
    rank: int
    held: I32Matrix
    num_blocks: int
    free_bytes: int = 0
    spare: int = 0


class Injected(Message, frozen=True, tag=29):
    """An injected fault happens now."""

    term: int
    rank: int
    incarnation: str
    number: int
    text: str = ""


class Staged(Message, frozen=True, tag=30):
    """All that comes to the rank for this generation is whole in its staging buffers, and all that it sends is sent;
    ``dropped``: it was cancelled, and the buffers are free. ``bytes_received`` from other ranks, ``seconds`` since
    StageExperts."""

    term: int
    epoch: int
    rank: int
    generation: int
    bytes_received: int = 0
    seconds: float = 0.0
    dropped: bool = False


FromWorker = (
    HelloWorker | StoreReady | Ready | StepDone | Fault | CallResult | BeatWorker | Loaded | Left | Injected | Staged
)


# ------------------------------------------------------------------------------------------- client to coordinator


class HelloClient(Message, frozen=True, tag=40):
    """The first message of a client. ``client_id`` is a uuid drawn by the client library, which keeps it when it
    connects again; ``term`` is the newest that it has seen."""

    version: int
    client_id: str
    term: int = 0


class Submit(Message, frozen=True, tag=41):
    """``prompt``: int32 (length,). ``sampling.stop_token_ids`` holds only the user's; the coordinator adds EOS.

    ``seed_given`` false: the coordinator draws one. ``n`` sequences are made, with index 0 to n - 1. ``nonce``: drawn
    by the client library for this submission; the same again is the same request, and is answered again. ``durable``:
    the request outlives its connection for the resume window. ``client_params`` is the client library's own, handed
    back by Resumed.
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
    nonce: str = ""
    durable: bool = False
    client_params: bytes = b""


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
    """Deliver from ``positions[index]`` on, none given: from the start.

    To a coordinator that may know less than the client does (WelcomeClient says so) also all that the client has:
    ``submit``, with the seed that was drawn, and ``tokens[index]``, int32, every generated token that it has read.
    """

    call_id: int
    request_id: str
    positions: tuple[int, ...]
    tokens: tuple[I32, ...] = ()
    submit: Submit | None = None


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


class MessageFault(Part, frozen=True):
    """What happens to messages between the coordinator and its ranks, with ``fault_injection`` only.

    ``kind``: drop, delay (by ``seconds``), duplicate, corrupt (bytes are replaced, so that it does not decode).
    ``direction``: to_worker, from_worker or both. ``messages``: names of messages, none: all. ``ranks``: none: all.
    ``probability`` per message, drawn from ``seed``; for ``lasting_s`` seconds (0.0: until the engine ends) and at most
    ``times`` messages (0: any number). ``number``: messages that it has met are counted under it, 0: not by itself.
    """

    kind: str
    direction: str = "both"
    messages: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    probability: float = 1.0
    seed: int = 0
    seconds: float = 0.0
    lasting_s: float = 0.0
    times: int = 0
    number: int = 0


class InjectFaults(Message, frozen=True, tag=51):
    """Bring faults upon the engine. ``clear``: forget what was ordered before and has not happened. ``full_disk``: 1
    makes the journal find its disk full, 0 ends that, -1 leaves it as it is. Answered by FaultsInjected."""

    call_id: int
    injections: tuple[Injection, ...] = ()
    messages: tuple[MessageFault, ...] = ()
    clear: bool = False
    full_disk: int = -1


class RebalanceExperts(Message, frozen=True, tag=52):
    """Plan a placement of experts now and carry it out, in dummy steps if nothing runs. ``placement``: int32
    (moe_layers, physical slots) to have instead of one planned here, (0, 0): none. Answered by ExpertsRebalanced when
    all is done or given up, or after ``timeout_s``; a later one, or a fault, ends one that is under way."""

    call_id: int
    placement: I32Matrix = NO_MATRIX
    timeout_s: float = 600.0


class ExpertLoadQuery(Message, frozen=True, tag=53):
    """Answered by ExpertLoad."""

    call_id: int


FromClient = (
    HelloClient
    | Submit
    | Stop
    | Cancel
    | Ack
    | Resume
    | StatusQuery
    | CallRanks
    | BeatClient
    | Goodbye
    | LayoutQuery
    | InjectFaults
    | RebalanceExperts
    | ExpertLoadQuery
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
    """The engine is ready. ``tokenizer``: the bytes of tokenizer.json, empty where there is none. ``knows_all``: false
    when this coordinator may lack requests or tokens that clients have: their Resumes should bring them.
    ``fault_injection``: whether it takes InjectFaults."""

    version: int
    term: int
    digest: str
    info: ModelInfo
    tokenizer: bytes
    knows_all: bool = True
    fault_injection: bool = False
    resume_window_s: float = 60.0


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
    """Something worth telling. ``kind``:

    starting, waiting (for ranks that somebody else starts), loading, ready, warning: the life of the engine;
    fault: a rank is lost or has failed, ``fault`` says how (exit, wedged, unreachable, exception, numeric, peer_lost,
    protocol) and ``evidence`` how that is known; regroup: the ranks of ``group`` come together anew as ``epoch``;
    recovered: they compute again, ``seconds`` after the fault; respawn: a process is started for ``rank``; parked: it
    has loaded; joined: it computes, and the group stood still for ``seconds``; crash_loop: it is not started again;
    quarantine, poisoned, numeric: requests suspected or found to kill ranks; rebalance: a placement of experts is
    planned, carried out, given up, or not worth it, as the text says; journal: its state changed; term: another
    coordinator has taken over; injected: an injected fault (``done`` is its number) happens."""

    kind: str
    text: str
    rank: int = -1
    done: int = 0
    total: int = 0
    group: int = -1
    incarnation: str = ""
    epoch: int = -1
    step: int = -1
    fault: str = ""
    evidence: str = ""
    seconds: float = 0.0
    term: int = 0
    request_ids: tuple[str, ...] = ()


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
    client_params: bytes = b""
    seed: int = 0
    max_tokens: int = 0


class LayoutFacts(Message, frozen=True, tag=82):
    """What a report of the layout is made of. ``question``: JSON, the model's shape and the sizes. ``placement``: int32
    (moe_layers, physical slots), the logical expert of each slot, or (0, 0). ``slots``: int32 (ep ranks,), how many of
    them each ep rank has, none while it does not compute; empty: shared out evenly."""

    call_id: int
    question: bytes
    placement: I32Matrix
    slots: I32 = NO_NUMBERS


class FaultsInjected(Message, frozen=True, tag=83):
    """Answer to InjectFaults. ``error``: why none of it was taken."""

    call_id: int
    error: ErrorInfo | None = None


class RebalanceReport(Part, frozen=True):
    """What became of a plan for the experts. ``outcome``: moved, unchanged (not worth it, or nothing to do), cancelled
    (some layers may have been moved) or failed; ``reason`` says why. ``policy``: who planned, "given" for a placement
    that was asked for, "" where there is no plan. Balancedness is the mean over layers of (mean rank load / max rank
    load) by the load that was planned for: of the placement before, and of the planned one.

    ``moves``: int32 (n, 4): MoE layer, physical slot, the expert that it had, the one that it got. ``slots_moved`` and
    ``bytes_moved`` count what was carried out, bytes between ranks alone. ``single_copy``: experts, over all layers,
    with one live copy.
    """

    outcome: str
    reason: str
    policy: str = ""
    balancedness_before: float = 1.0
    balancedness: float = 1.0
    slots_moved: int = 0
    bytes_moved: int = 0
    layers: int = 0
    solve_ms: float = 0.0
    seconds: float = 0.0
    single_copy: int = 0
    moves: I32Matrix = NO_FETCHES


class ExpertsRebalanced(Message, frozen=True, tag=84):
    """Answer to RebalanceExperts. ``error``: why it was refused."""

    call_id: int
    report: RebalanceReport | None = None
    error: ErrorInfo | None = None


class ExpertLoad(Message, frozen=True, tag=85):
    """The expert load of the window. ``tokens``: int32 (snapshots * num_layers, experts), what each logical expert
    computed; ``steps``: int32 (snapshots,), steps that each covers, oldest first. ``placement``: int32 (num_layers,
    physical slots), the one in force. ``error``: why there is none."""

    call_id: int
    num_layers: int
    steps: I32
    tokens: I32Matrix
    placement: I32Matrix
    error: ErrorInfo | None = None


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
    | FaultsInjected
    | ExpertsRebalanced
    | ExpertLoad
)


# ---------------------------------------------------------------------------------------- supervisor and coordinator


class Started(Part, frozen=True):
    """A worker process that lives: its rank, and the launch token that it was started with."""

    rank: int
    pid: int
    token: str


class HelloSupervisor(Message, frozen=True, tag=100):
    """The first message of the supervisor, with the token that the coordinator was started with. ``members``: the
    processes that it has started before and that live."""

    version: int
    token: str
    pid: int
    members: tuple[Started, ...] = ()


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


class Notice(Message, frozen=True, tag=107):
    """Something that the supervisor should log: ``kind`` as in Event."""

    kind: str
    text: str


FromSupervisor = HelloSupervisor | Exited | Spawned | Stopping | Beat
ToSupervisor = Spawn | Kill | Stopping | Beat | Notice
FromWorkerSide = FromWorker | FromSupervisor
