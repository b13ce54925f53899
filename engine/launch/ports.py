"""The address at which ranks find the coordinator, and ports that were asked for by number."""

from __future__ import annotations

from collections.abc import Sequence

from drumline.engine.parallel_config import ParallelConfig
from drumline.protocol.endpoints import bind_tcp
from drumline.protocol.errors import InvalidConfig


def worker_endpoint(parallel: ParallelConfig, runtime_dir: str) -> str:
    """Where ranks connect: a socket in the private folder, or the port that ``data_parallel_rpc_port`` names."""
    if not parallel.data_parallel_rpc_port:
        return f"ipc://{runtime_dir}/worker.sock"
    host = parallel.data_parallel_master_ip
    return f"tcp://{f'[{host}]' if ':' in host else host}:{parallel.data_parallel_rpc_port}"


def check_ports(parallel: ParallelConfig, groups: Sequence[Sequence[int]]) -> None:
    """Refuse a port that somebody listens on already, by the field that names it, before any process is started.

    Whoever uses the port later binds it before it tells it; this only makes the usual mistake fail at once. Raises
    InvalidConfig.
    """
    ports = [("data_parallel_rpc_port", parallel.data_parallel_rpc_port)]
    if parallel.data_parallel_master_port:
        # A group of one rank meets nobody and has no store.
        numbers = (number for number, ranks in enumerate(groups) if len(ranks) > 1)
        ports += [("data_parallel_master_port", parallel.data_parallel_master_port + number) for number in numbers]
    for field, port in ports:
        if port:
            _check_free(field, parallel.data_parallel_master_ip, port)


def _check_free(field: str, host: str, port: int) -> None:
    try:
        bound, _ = bind_tcp(host, port)
    except InvalidConfig as error:
        raise InvalidConfig(field, error.info.found, "0, or a port that no other process listens on") from error
    bound.close()
