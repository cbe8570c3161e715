"""Every call, ended in every way, over every transport: what a server holds afterwards.

    PREFILLD_BUILD=$PWD/build build/venv/bin/python tests/bench/service/state_matrix.py
        [--repeats=100] [--restarts=10] [--unary=20] [--transports=grpc,posix_shm,tls]

Attend, Prefill and PullKv end well, by a cancellation, by a deadline, by kill -9 of their client or
by a cut connection, --repeats times each at random moments; and --restarts times each by a step
that never ends (which ends the process) and by SIGTERM (which drains it). Unary calls are ended in
the same ways, --unary times each. After each kind, within the leases' time and a second, the server
must have what it had before: blocks, leases, running, waiting and uploading requests, connections,
descriptors, segments, threads, memory. Caches and outputs that arrive are compared with what a
first call gave. In the end admitted requests must be finished, cancelled or failed, and leases
granted be leases ended. Exits with 1 unless all of it holds.
"""

import argparse
import collections
import dataclasses
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time

import grpc
import numpy as np
import rig
from cutting_proxy import CuttingProxy

from e2e import attending, checkpoints, harness
from prefilld import Credentials, PrefillClient, PrefilldError, RetryPolicy
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1 import model_service_pb2, prefill_service_pb2, sparsity_pb2

TTL_S = 2
ATTEND_TOKENS, PROMPT_TOKENS = 900, 1500
KV_MEMORY_MIB = 64
# Blocks stay once they were touched; what malloc keeps, 32 MiB or more, goes only within 10 s.
MEMORY_SLACK_KIB = (KV_MEMORY_MIB + 48) << 10
THREADS_SLACK = 4            # of gRPC's own, after its first burst
ONCE = RetryPolicy(attempts=1)
TLS = harness.ROOT / "tests" / "fixtures" / "tls"
EXPECTED = {"ok": {"OK"}, "cancel": {"OK", "CANCELLED"},
            "deadline": {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"},  # refused as too late
            "cut": {"OK", "UNAVAILABLE"}, "kill": {"KILLED", "OK"},
            "drain": {"OK", "UNAVAILABLE"}, "hang": {"UNAVAILABLE"}}


@dataclasses.dataclass
class Site:
    """Where calls go, and what they must give."""

    target: str
    transport: str  # "tls" is grpc
    prompt: rig.Prompt
    qkv: tuple
    attended: bytes = b""

    def client(self, target: str = "") -> PrefillClient:
        named = "grpc" if self.transport == "tls" else self.transport
        return PrefillClient(target or self.target, credentials=credentials_of(self.transport),
                             retry=ONCE, transport=named)


def credentials_of(transport: str) -> Credentials | None:
    return Credentials(tls_ca=str(TLS / "ca.pem")) if transport == "tls" else None


def attend(site: Site, client: PrefillClient, timeout: float, began) -> rig.Bytes:
    began(client.close)
    result = client.attend(*site.qkv, timeout=timeout, method="dense")
    output = np.ascontiguousarray(result.o).tobytes()
    return rig.Bytes(checked=1, wrong=bool(site.attended) and output != site.attended)


def prefill(site: Site, client: PrefillClient, timeout: float, began) -> rig.Bytes:
    began(client.close)
    with client.prefill(rig.MODEL, site.prompt.token_ids, method="dense", timeout=timeout) as call:
        call.summary
    return rig.Bytes()


def pull(site: Site, client: PrefillClient, timeout: float, began) -> rig.Bytes:
    """What ends it begins with the pull, of a cache that is complete."""
    seen = rig.Bytes()
    with client.prefill(rig.MODEL, site.prompt.token_ids, method="dense") as call:
        call.summary
        lease = call.detach()
    with site.client(client_target(client, site)) as other:
        pulled = other.pull(lease, rig.MODEL, timeout=timeout)
        began(pulled.cancel)
        site.prompt.check(pulled, seen)
        other.release(lease)
    return seen


def client_target(client: PrefillClient, site: Site) -> str:
    return getattr(client, "through", site.target)


CALLS = {"Attend": attend, "Prefill": prefill, "PullKv": pull}


def outcome(site: Site, call, seen: rig.Bytes, *, target: str = "", timeout: float = 60,
            began=lambda cancel: None) -> str:
    """The code that it ended with."""
    try:
        with site.client(target) as client:
            client.through = target or site.target
            got = call(site, client, timeout, began)
            seen.checked += got.checked
            seen.rounded += got.rounded
            seen.wrong += got.wrong
            return "OK"
    except PrefilldError as error:
        return error.code.name
    except ValueError:  # grpc's, of a channel that was closed before the call
        return "CANCELLED"


def killed(site: Site, name: str, delay: float) -> None:
    """A client that is gone in the middle; in a process of its own."""
    def began(_) -> None:
        threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

    outcome(site, CALLS[name], rig.Bytes(), began=began)


class Matrix:
    """One server, and what became of its calls."""

    def __init__(self, args, server: harness.Server, site: Site, proxy: CuttingProxy):
        self.args, self.server, self.site, self.proxy = args, server, site, proxy
        self.draw = random.Random(1)
        self.seen = rig.Bytes()
        self.problems: list[str] = []
        self.processes = multiprocessing.get_context("forkserver")
        self.lasts = {name: self._lasts(call) for name, call in CALLS.items()}
        time.sleep(TTL_S + 1)
        self.before = held(server)

    def _lasts(self, call) -> float:
        """Seconds from where it is ended by others to its own end, the least of some."""
        times = []
        for _ in range(4):
            starts: list[float] = []
            outcome(self.site, call, rig.Bytes(),
                    began=lambda _, starts=starts: starts.append(time.monotonic()))
            times.append(time.monotonic() - starts[0])
        return min(times)

    def end(self, name: str, how: str) -> str:
        call, delay = CALLS[name], self.draw.random() * self.lasts[name]
        if how == "kill":
            process = self.processes.Process(target=killed, args=(self.site, name, delay))
            process.start()
            process.join(60)
            return "KILLED" if process.exitcode == -signal.SIGKILL else "OK"
        if how == "deadline":
            return outcome(self.site, call, self.seen, timeout=max(delay, 1e-3))
        timers: list[threading.Timer] = []

        def began(cancel) -> None:
            timers.append(threading.Timer(delay, cancel if how == "cancel" else self.proxy.cut))
            timers[-1].start()

        code = outcome(self.site, call, self.seen, began=began if how != "ok" else lambda _: None,
                       target=self.proxy.target if how == "cut" else "")
        for timer in timers:
            timer.cancel()
            timer.join()
        return code

    def cell(self, name: str, how: str) -> None:
        codes = collections.Counter(self.end(name, how) for _ in range(self.args.repeats))
        self.settle(f"{self.site.transport:9} {name:7} {how:8}", codes, EXPECTED[how])

    def settle(self, what: str, codes: collections.Counter, expected: set[str]) -> None:
        began = time.monotonic()
        left = moved(self.before, held(self.server))
        while left and time.monotonic() - began < TTL_S + 1:
            time.sleep(0.05)
            left = moved(self.before, held(self.server))
        strange = set(codes) - expected
        print(f"{what} {dict(codes)}  back after {time.monotonic() - began:.1f} s"
              + (f"  NOT BACK {left}" if left else "")
              + (f"  STRANGE {strange}" if strange else ""), flush=True)
        if left or strange:
            self.problems.append(f"{what}: left {left}, strange {strange}")

    def unary(self) -> None:
        for name, request in unary_calls(self.server).items():
            for how in ("ok", "cancel", "deadline", "cut"):
                codes = collections.Counter(self._unary(name, request, how)
                                            for _ in range(self.args.unary))
                self.settle(f"{self.site.transport:9} {name} {how}", codes,
                            EXPECTED[how] | {"NOT_FOUND"})

    def _unary(self, name: str, request, how: str) -> str:
        target = self.proxy.target if how == "cut" else self.site.target
        credentials = self.site.transport == "tls" and grpc.ssl_channel_credentials(
            (TLS / "ca.pem").read_bytes())
        options = harness.channel_options()
        channel = (grpc.secure_channel(target, credentials, options) if credentials
                   else grpc.insecure_channel(target, options))
        with channel:
            kind, reply = request
            method = channel.unary_unary(f"/prefilld.v1.{name}",
                                         request_serializer=type(kind).SerializeToString,
                                         response_deserializer=reply.FromString)
            timeout = self.draw.random() * 0.004 + 1e-6 if how == "deadline" else 20
            call = method.future(kind, timeout=timeout)
            if how == "cancel":
                time.sleep(self.draw.random() * 0.002)
                call.cancel()
            elif how == "cut":
                time.sleep(self.draw.random() * 0.004)
                self.proxy.cut()
            try:
                call.result()
                return "OK"
            except grpc.FutureCancelledError:
                return "CANCELLED"
            except grpc.RpcError as error:
                return error.code().name

    def accounts(self) -> None:
        """Admitted is finished, cancelled or failed; granted is ended."""
        for call in ("attend", "prefill"):
            admitted, by_code = rig.ends(self.server, call)
            finished = self.server.metric("prefilld_requests_total", method=call.capitalize())
            print(f"{call}: calls finished {finished:.0f}, admitted {admitted}, ended {by_code}")
            if admitted != sum(by_code.values()) or finished < admitted:
                self.problems.append(f"{call}: {admitted} admitted, {by_code} ended")
        prompts = self.server.metric("prefilld_prompt_tokens_count")
        if prompts != admitted:
            self.problems.append(f"{admitted} prompts admitted, {prompts:.0f} by the metrics")
        samples = self.server.metrics()
        granted = harness.total(samples, "prefilld_leases_granted_total")
        ended = harness.total(samples, "prefilld_leases_ended_total")
        print(f"leases: granted {granted:.0f}, ended {ended:.0f}; {self.seen}")
        if granted != ended or self.seen.wrong:
            self.problems.append(f"leases {granted} granted, {ended} ended; {self.seen}")


def unary_calls(server: harness.Server) -> dict[str, tuple]:
    lease = {"lease": "none", "generation": 1}
    return {
        "ModelService/ListModels": (model_service_pb2.ListModelsRequest(),
                                    model_service_pb2.ListModelsResponse),
        "ModelService/GetModel": (model_service_pb2.GetModelRequest(name=rig.MODEL),
                                  model_service_pb2.Model),
        "KvHandoffService/Negotiate": (kv.NegotiateRequest(model=rig.MODEL), kv.NegotiateResponse),
        "KvHandoffService/RenewLease": (kv.RenewLeaseRequest(**lease), kv.Lease),
        "KvHandoffService/ReleaseLease": (
            kv.ReleaseLeaseRequest(reason=kv.RELEASE_REASON_ABANDONED, **lease),
            kv.ReleaseLeaseResponse),
        "PrefillService/GetSparsityReport": (
            prefill_service_pb2.GetSparsityReportRequest(request_id="none"),
            sparsity_pb2.SparsityReport)}


def held(server: harness.Server) -> dict[str, float]:
    return {**server.footprint(), "connections": server.metric("prefilld_connections"),
            "descriptors": server.descriptors(), "threads": server.threads(),
            "rss KiB": server.memory_kib("VmRSS"),
            "segments": server.metric("prefilld_descriptors", kind="segments", state="used")}


def moved(before: dict[str, float], now: dict[str, float]) -> dict[str, tuple[float, float]]:
    """What is not back. Less than before is fine where the system decides."""
    slack = {"threads": THREADS_SLACK, "rss KiB": MEMORY_SLACK_KIB,
             "connections": 1, "descriptors": 2}  # the server's check of itself, both ends
    return {name: (before[name], value) for name, value in now.items()
            if (value > before[name] + slack[name] if name in slack else value != before[name])}


def start(model: checkpoints.Checkpoint, transport: str, log: pathlib.Path, *flags: str):
    """A server that every transport's calls can be sent to."""
    if transport == "tls":
        flags = (*flags, f"--tls_cert={TLS}/server.pem", f"--tls_key={TLS}/server.key")
    return harness.Server(f"--kv_memory={KV_MEMORY_MIB}MiB", f"--lease_ttl={TTL_S}s",
                          "--max_connection_rate=100000", *flags, log_path=log,
                          models=[(rig.MODEL, model.directory)])


def restarts(args, model, transport: str, folder: pathlib.Path, site: Site) -> list[str]:
    """What ends the process: each time a new one."""
    problems, draw = [], random.Random(2)
    for name, call in CALLS.items():
        for how, status in (("drain", 0), ("hang", 1)):
            codes, exits, strange = collections.Counter(), collections.Counter(), []
            for i in range(args.restarts):
                log = folder / f"{transport}-{name}-{how}-{i}.jsonl"
                # A prompt is four layers.
                flags = [f"--inject_hang={1 + i % 4 if name != 'Attend' else 1}",
                         "--stall_timeout=500ms"] if how == "hang" else []
                server = start(model, transport, log, *flags)
                here = dataclasses.replace(site, target=server.target)
                timer = threading.Timer(draw.random() * 0.2, server.terminate)
                if how == "drain":
                    timer.start()
                codes[outcome(here, call, rig.Bytes(), timeout=20)] += 1
                timer.join() if how == "drain" else timer.cancel()
                server.channel.close()
                exits[server.wait(60)] += 1
                strange += accounts_of(server) if how == "drain" else []
            print(f"{transport:9} {name:7} {how:8} {dict(codes)}  exits {dict(exits)}"
                  + (f"  STRANGE {strange}" if strange else ""), flush=True)
            if set(exits) != {status} or set(codes) - EXPECTED[how] or strange:
                problems.append(f"{transport} {name} {how}: exits {dict(exits)}, {dict(codes)}, "
                                f"{strange}")
    return problems


def accounts_of(server: harness.Server) -> list[str]:
    """Of a process that is gone, by its log."""
    found = []
    for call in ("attend", "prefill"):
        admitted, by_code = rig.ends(server, call)
        if admitted != sum(by_code.values()):
            found.append(f"{call}: {admitted} admitted, {by_code} ended")
    return found


def run(args, transport: str, folder: pathlib.Path, model: checkpoints.Checkpoint) -> list[str]:
    problems: list[str] = []
    with start(model, transport, folder / f"{transport}.jsonl") as server:
        site = Site(server.target, transport,
                    rig.Prompt(model, PROMPT_TOKENS, server.target,
                               credentials=credentials_of(transport)),
                    attending.small(tokens=ATTEND_TOKENS))
        with site.client() as client:
            result = client.attend(*site.qkv, method="dense")
            site.attended = np.ascontiguousarray(result.o).tobytes()
        with CuttingProxy(server.target) as proxy:
            matrix = Matrix(args, server, site, proxy)
            for name in CALLS:
                for ending in ("ok", "cancel", "deadline", "cut", "kill"):
                    matrix.cell(name, ending)
            matrix.unary()
            matrix.accounts()
            problems += matrix.problems
    return problems + restarts(args, model, transport, folder, site)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--unary", type=int, default=20)
    parser.add_argument("--transports", default="grpc,posix_shm,tls")
    args = parser.parse_args()
    problems: list[str] = []
    # Clients that are killed come from a process that has imported all of this, and called nothing.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["rig", "state_matrix"])
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoints.Checkpoint.create(pathlib.Path(folder) / "model")
        for transport in args.transports.split(","):
            problems += run(args, transport, pathlib.Path(folder), model)
    print("\n".join(["all is back"] if not problems else ["NOT as it must be:", *problems]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
