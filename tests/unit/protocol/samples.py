"""One sample of every message, and a comparison that sees into arrays.

``python -m tests.unit.protocol.samples`` writes golden bytes for messages that have none yet. What is there is never
changed by it: a message whose bytes change is a new protocol version, or a mistake.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from drumline.protocol import messages as m
from drumline.protocol.codec import Codec
from drumline.protocol.errors import ErrorInfo

GOLDEN_PATH = Path(__file__).with_name("golden.json")
EARLIER_PATHS = (
    Path(__file__).with_name("golden_before_lanes.json"),
    Path(__file__).with_name("golden_before_recovery.json"),
    Path(__file__).with_name("golden_before_rebalancing.json"),
)

UNIONS: dict[str, Any] = {
    "ToWorker": m.ToWorker,
    "FromWorker": m.FromWorker,
    "FromClient": m.FromClient,
    "ToClient": m.ToClient,
    "FromSupervisor": m.FromSupervisor,
    "ToSupervisor": m.ToSupervisor,
    "FromWorkerSide": m.FromWorkerSide,
}
ALL_MESSAGES = tuple(sorted(m.Message.__subclasses__(), key=lambda cls: int(cls.__struct_config__.tag or 0)))
ANY_MESSAGE: Any = m.ToWorker | m.FromWorker | m.FromClient | m.ToClient | m.FromSupervisor | m.ToSupervisor


def i32(*values: int) -> m.I32:
    return np.array(values, dtype=np.int32)


def f32(*values: float) -> m.F32:
    return np.array(values, dtype=np.float32)


SAMPLING = m.SamplingSpec(
    seed=(1 << 63) + 5,
    index=1,
    temperature=0.75,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    min_tokens=3,
    stop_token_ids=(2, 70000),
    logprobs=5,
)
CONFIG = m.WorkerConfig(
    model="/models/demo",
    dtype="float32",
    max_model_len=1024,
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    block_size=16,
    num_blocks=0,
    kv_cache_memory_bytes=1 << 30,
    gpu_memory_utilization=0.9,
    data_parallel_size=2,
    enable_expert_parallel=True,
    expert_placement_strategy="round_robin",
    seed=7,
    local_ranks=2,
    num_threads=1,
    fault_injection=False,
    beat_interval_s=0.5,
    attention_data_parallel_size=2,
    pipeline_partition=(3, 4),
    all2all_backend="all_to_all",
    kv_cache_dtype="bfloat16",
    worker_cls="app.MyWorker",
    worker_extension_cls="app.Extension",
    distributed_timeout_s=30.0,
    max_parallel_loading_workers=2,
    runtime_dir="/run/drumline",
    first_local_rank=2,
    first_local_device=1,
    coordinator_lease_s=60.0,
    enable_eplb=True,
    load_interval=32,
)
INJECTION = m.Injection(number=4, rank=1, kind="slow", point="decode", step=9, seconds=1.5, factor=3.0)
ERROR = ErrorInfo(
    kind="request_failed",
    text="rank 1 died",
    retryable=True,
    rank=1,
    incarnation="i-1",
    epoch=3,
    step=44,
    traceback="Traceback...",
    field="",
    found="",
    valid="",
)
LOGPROB = m.LogprobEntry(token=5, logprob=-0.5, rank=2, top_tokens=i32(9, 5), top_logprobs=f32(-0.25, -0.5))
END = m.StreamEnd(handle=3, request_id="r1", index=0, reason="stop", stop_token=2, num_tokens=17, num_cached_tokens=16)
INFO = m.ModelInfo(
    model="/models/demo",
    served_model_name="demo",
    vocab_size=2048,
    max_model_len=1024,
    eos_token_ids=(0, 1),
    data_parallel_size=2,
    max_prompt_tokens=1000,
    has_tokenizer=True,
    block_size=16,
)
# 600 elements are 2,400 bytes: over the limit for inline arrays, so that a frame of its own is in the golden bytes too.
LONG_PROMPT = np.arange(600, dtype=np.int32)

SAMPLES: tuple[m.Message, ...] = (
    m.WelcomeWorker(version=1, term=2, digest="0123456789abcdef", config=CONFIG, injections=(INJECTION,)),
    m.OpenStore(term=2, epoch=3, host="127.0.0.1", port=29500),
    m.Configure(
        term=2,
        epoch=3,
        role="serve",
        members=(m.Member(0, "i-0"), m.Member(1, "i-1")),
        store_host="127.0.0.1",
        store_port=40001,
        placement=np.array([[0, 1, 2, 3], [0, 2, 1, 3]], dtype=np.int32),
        parked=(m.Member(2, "i-2"),),
        slots=i32(3, 1),
        fetches=np.array([[0, 3, 2, 1], [1, 1, -1, 0]], dtype=np.int32),
        nodes=i32(0, 1),
    ),
    m.Step(
        term=2,
        epoch=3,
        wave=4,
        step=1000,
        num_tokens_across_dp=i32(600, 0),
        evicted=i32(7),
        admitted=(m.Admit(7, LONG_PROMPT, 600, 32, i32(4, 5, 6), SAMPLING, 1),),
        append_rows=i32(1, 2),
        append_blocks=i32(90, 91),
        prefill_rows=i32(7),
        prefill_counts=i32(568),
        lane=1,
        shuffle=m.Shuffle(generation=5, commit=True, first=2, end=4, home_first=1, home_end=3),
    ),
    m.Call(term=2, epoch=3, call_id=9, method="stats", args=b"\x90"),
    m.Shutdown(term=2, reason="closed"),
    m.HelloWorker(
        version=1,
        token="secret",
        rank=1,
        incarnation="i-1",
        pid=4242,
        host="node",
        term=2,
        epoch=3,
        loaded=True,
        digest="0123456789abcdef",
    ),
    m.StoreReady(term=2, epoch=3, rank=0, host="127.0.0.1", port=40001),
    m.Ready(
        term=2,
        epoch=3,
        rank=1,
        digest="0123456789abcdef",
        num_blocks=4096,
        block_bytes=65536,
        weight_bytes=1 << 34,
        load_s=1.5,
        device="cpu",
    ),
    m.StepDone(
        term=2,
        epoch=3,
        rank=1,
        step=1000,
        tokens=i32(11, -1, 13),
        logprob_index=i32(0),
        logprobs=(LOGPROB,),
        load=np.array([[9, 0, 4], [1, 2, 3]], dtype=np.int32),
        load_steps=32,
    ),
    m.Fault(term=2, epoch=3, rank=1, error=ERROR, rows=(3, 4)),
    m.CallResult(term=2, epoch=3, call_id=9, rank=1, ok=False, value=b"", error=ERROR),
    m.BeatWorker(
        term=2, epoch=3, rank=1, step=1000, collective=12, inside=True, load_done=5, load_total=10, lease_s=60.0
    ),
    m.HelloClient(version=1, client_id="c-1", term=2),
    m.Submit(
        call_id=1,
        request_id="r1",
        prompt=LONG_PROMPT,
        sampling=SAMPLING,
        max_tokens=64,
        n=2,
        seed_given=True,
        ignore_eos=True,
        priority=-1,
        data_parallel_rank=1,
        nonce="n-1",
        durable=True,
        client_params=b"{}",
    ),
    m.Stop(request_id="r1", index=0, num_tokens=12),
    m.Cancel(call_id=2, request_id="r1"),
    m.Ack(frame=16),
    m.Resume(
        call_id=3,
        request_id="r1",
        positions=(4, 0),
        tokens=(i32(4, 5), i32()),
        submit=m.Submit(call_id=0, request_id="r1", prompt=i32(1, 2, 3), sampling=SAMPLING, max_tokens=64),
    ),
    m.StatusQuery(call_id=4),
    m.CallRanks(call_id=5, method="ping", args=b"\x90", timeout_s=2.5),
    m.BeatClient(client_id="c-1"),
    m.Goodbye(client_id="c-1"),
    m.WelcomeClient(
        version=1,
        term=2,
        digest="0123456789abcdef",
        info=INFO,
        tokenizer=b"{}",
        knows_all=False,
        fault_injection=True,
        resume_window_s=30.0,
    ),
    m.Accepted(call_id=1, request_id="r1", handles=i32(3, 4), seed=99, num_cached_tokens=16),
    m.Rejected(call_id=1, request_id="r1", error=ERROR),
    m.Tokens(
        frame=8,
        handles=i32(3, 4),
        positions=i32(0, 5),
        tokens=i32(11, 12),
        logprob_index=i32(1),
        logprobs=(LOGPROB,),
    ),
    m.Finished(frame=9, ends=(END,)),
    m.Cancelled(call_id=2, request_id="r1"),
    m.Failed(request_id="r1", error=ERROR),
    m.StatusReport(call_id=4, status=b"{}"),
    m.Event(
        kind="fault",
        text="rank 1",
        rank=1,
        done=5,
        total=10,
        group=1,
        incarnation="i-1",
        epoch=3,
        step=44,
        fault="exit",
        evidence="signal 9",
        seconds=0.5,
        term=2,
        request_ids=("r1",),
    ),
    m.CallRanksResult(call_id=5, answers=(m.RankAnswer(0, True, b"\xc0"), m.RankAnswer(1, False, b"", ERROR))),
    m.Behind(frame=80),
    m.Resumed(
        call_id=3,
        request_id="r1",
        prompt=i32(1, 2, 3),
        handles=i32(8, 9),
        tokens=(i32(4, 5), i32()),
        ends=(END,),
        logprobs=((LOGPROB,), ()),
        client_params=b"{}",
        seed=99,
        max_tokens=64,
    ),
    m.LayoutQuery(call_id=6),
    m.LayoutFacts(call_id=6, question=b"{}", placement=np.array([[0, 1], [1, 0]], dtype=np.int32), slots=i32(2, 0)),
    m.HelloSupervisor(version=1, token="secret", pid=4241, members=(m.Started(1, 4242, "secret"),)),
    m.Exited(rank=1, pid=4242, code=-9, signal=9, stderr_tail="Killed"),
    m.Spawned(rank=1, pid=4242),
    m.Spawn(rank=1, token="secret"),
    m.Kill(rank=1, pid=4242),
    m.Stopping(reason="closed", error=ERROR),
    m.Beat(pid=4241),
    m.Leave(term=2, epoch=3),
    m.Load(term=2, experts=np.array([[0, 1], [-1, -1]], dtype=np.int32), num_blocks=4096),
    m.Inject(term=2, injections=(INJECTION,)),
    m.Loaded(
        term=2,
        rank=1,
        digest="0123456789abcdef",
        num_blocks=4096,
        block_bytes=65536,
        weight_bytes=1 << 34,
        load_s=1.5,
        device="cpu",
        free_bytes=1 << 33,
    ),
    m.Left(
        term=2,
        epoch=3,
        rank=1,
        held=np.array([[0, 1], [-1, -1]], dtype=np.int32),
        num_blocks=4096,
        free_bytes=1 << 33,
        spare=1,
    ),
    m.Injected(term=2, rank=1, incarnation="i-1", number=4, text="slow in step 9"),
    m.InjectFaults(
        call_id=7,
        injections=(INJECTION,),
        messages=(
            m.MessageFault(
                kind="delay",
                direction="to_worker",
                messages=("Step",),
                ranks=(1,),
                probability=0.5,
                seed=3,
                seconds=0.1,
                lasting_s=5.0,
                times=9,
                number=6,
            ),
        ),
        clear=True,
        full_disk=1,
    ),
    m.FaultsInjected(call_id=7, error=ERROR),
    m.Notice(kind="journal", text="degraded"),
    m.StageExperts(
        term=2,
        epoch=3,
        generation=5,
        layer=1,
        placement=i32(0, 2, 1, 1),
        fetches=np.array([[1, 2, 0, 1], [1, 3, 1, 0]], dtype=np.int32),
        rounds=i32(0, 1, 2),
        parts=3,
    ),
    m.CancelStage(term=2, epoch=3, generation=5),
    m.Staged(term=2, epoch=3, rank=1, generation=5, bytes_received=98304, seconds=0.25, dropped=True),
    m.RebalanceExperts(call_id=8, placement=np.array([[0, 1], [1, 0]], dtype=np.int32), timeout_s=60.0),
    m.ExpertLoadQuery(call_id=9),
    m.ExpertsRebalanced(
        call_id=8,
        report=m.RebalanceReport(
            outcome="moved",
            reason="balancedness 0.71 to 0.97",
            policy="incremental",
            balancedness_before=0.71,
            balancedness=0.97,
            slots_moved=2,
            bytes_moved=98304,
            layers=1,
            solve_ms=1.5,
            seconds=0.75,
            single_copy=3,
            moves=np.array([[1, 2, 7, 4]], dtype=np.int32),
        ),
        error=ERROR,
    ),
    m.ExpertLoad(
        call_id=9,
        num_layers=2,
        steps=i32(32, 16),
        tokens=np.array([[5, 6], [7, 8], [9, 10], [11, 12]], dtype=np.int32),
        placement=np.array([[0, 1], [1, 0]], dtype=np.int32),
        error=ERROR,
    ),
)


def read_golden() -> dict[str, list[str]]:
    golden: dict[str, list[str]] = json.loads(GOLDEN_PATH.read_text())
    return golden


def plain(value: Any) -> Any:
    """``value`` with structs and arrays as tuples that compare by content, type and dtype."""
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, msgspec.Struct):
        return (type(value).__name__, *(plain(getattr(value, name)) for name in value.__struct_fields__))
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value


def main() -> None:
    golden = read_golden() if GOLDEN_PATH.exists() else {}
    codec: Codec[m.Message] = Codec(ANY_MESSAGE)
    for sample in SAMPLES:
        golden.setdefault(type(sample).__name__, [bytes(frame).hex() for frame in codec.encode(sample)])
    GOLDEN_PATH.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
