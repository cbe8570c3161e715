"""What a health check takes while the server finds gigabytes for others:

    python tests/bench/service/health_under_allocation.py [--prefilld=build/prefilld] [--checks=500]

Starts a server with --attend_memory=8GiB. Three callers announce an Attend of 1.6 GB each over
posix_shm and then send nothing; meanwhile a health check is made every 10 ms. Prints the median,
the p99 and the worst of them in milliseconds.
"""

import argparse
import pathlib
import socket
import subprocess
import sys
import threading
import time

import grpc

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "client/python"))

from prefilld.v1 import kv_handoff_service_pb2 as kv  # noqa: E402
from prefilld.v1 import prefill_service_pb2 as pb  # noqa: E402
from prefilld.v1 import prefill_service_pb2_grpc as services  # noqa: E402
from prefilld.v1 import tensor_pb2  # noqa: E402

CALLERS = 3
# q and o of 32 heads, k and v of 8: 1.6 GB in F32 with d 128.
TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM = 39_000, 32, 8, 128
PAUSE_S = 0.010


def header() -> pb.AttendRequest:
    heads = {"q": Q_HEADS, "k": KV_HEADS, "v": KV_HEADS}
    return pb.AttendRequest(header=pb.AttendHeader(
        transport=kv.TRANSPORT_POSIX_SHM,
        tensors=[tensor_pb2.TensorSpec(name=name, data_type=tensor_pb2.DATA_TYPE_F32,
                                       shape=[TOKENS, count, HEAD_DIM])
                 for name, count in heads.items()]))


def announce(target: str, begin: threading.Event, end: threading.Event, admitted: list) -> None:
    def requests():
        begin.wait()
        yield header()
        end.wait()

    with grpc.insecure_channel(target) as channel:
        call = services.PrefillServiceStub(channel).Attend(requests())
        start = time.perf_counter()
        next(call)  # the admission
        admitted.append(time.perf_counter() - start)
        end.wait()
        call.cancel()


def check_times(target: str, checks: int) -> list[float]:
    """Seconds from when each was due, so that one that hangs does not hold the next ones back."""
    times = []
    with grpc.insecure_channel(target) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        check(b"", timeout=60)
        done = threading.Semaphore(0)
        start = time.perf_counter()
        for i in range(checks):
            due = start + i * PAUSE_S
            time.sleep(max(0.0, due - time.perf_counter()))

            def note(call, due=due):
                call.result()
                times.append(time.perf_counter() - due)
                done.release()

            check.future(b"", timeout=60).add_done_callback(note)
        for _ in range(checks):
            done.acquire()
    return times


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefilld", default=str(ROOT / "build/prefilld"))
    parser.add_argument("--checks", type=int, default=500)
    options = parser.parse_args()
    target = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen([options.prefilld, f"--listen={target}", "--http=127.0.0.1:0",
                               "--backend=cpu", "--attend_memory=8GiB"], stderr=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL)
    try:
        with grpc.insecure_channel(target) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
        begin, end, admitted = threading.Event(), threading.Event(), []
        callers = [threading.Thread(target=announce, args=(target, begin, end, admitted))
                   for _ in range(CALLERS)]
        for caller in callers:
            caller.start()
        begin.set()
        times = sorted(check_times(target, options.checks))
        end.set()
        for caller in callers:
            caller.join()
        ms = [1e3 * t for t in times]
        print(f"{len(ms)} health checks: median {ms[len(ms) // 2]:.2f} ms, "
              f"p99 {ms[len(ms) * 99 // 100]:.2f} ms, worst {ms[-1]:.2f} ms; "
              f"{len(admitted)} of {CALLERS} admitted, the last after {max(admitted):.2f} s")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
