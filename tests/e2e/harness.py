"""A prefilld process under test: started on free ports, watched from outside, ended by SIGTERM."""

import contextlib
import json
import os
import pathlib
import re
import resource
import signal
import ssl
import subprocess
import threading
import time
import urllib.request

import grpc
from google.rpc import error_details_pb2, status_pb2

from prefilld.v1 import (kv_handoff_service_pb2_grpc, model_service_pb2_grpc,
                         prefill_service_pb2_grpc)

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("PREFILLD_BUILD", ROOT / "build")).resolve()
PREFILLD = BUILD / "prefilld"
PREFILLCTL = BUILD / "prefillctl"
START_TIMEOUT_S = 60
# Gauges that a server without work shows at rest.
RESTING = ("prefilld_requests_running", "prefilld_requests_waiting", "prefilld_leases_active",
           "prefilld_upload_bytes_inflight", "prefilld_requests_uploading", "prefilld_queue_tokens")


class HttpPort:
    """What a prefilld says of itself, from before its models are loaded."""

    def __init__(self, http, tls=False):
        self.http = http
        self.tls = tls

    def get(self, path, headers=(), client=None):
        """(status, body) of the HTTP port; client: (certificate, key) of who asks."""
        context = unverified(client) if self.tls else None
        request = urllib.request.Request(f"http{'s' if self.tls else ''}://{self.http}{path}",
                                         headers=dict(headers))
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self):
        """{(name, ((label, value), ...)): number} of /metrics."""
        samples = {}
        for line in self.get("/metrics")[1].splitlines():
            if line and not line.startswith("#"):
                name, labels, value = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)(?: \d+)?",
                                                   line).groups()
                pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")
                samples[name, tuple(sorted(pairs))] = float(value)
        return samples

    def metric(self, name, **labels):
        """The sum of all series of `name` that carry these labels."""
        return total(self.metrics(), name, **labels)


class Server(HttpPort):
    """One prefilld; use as a context manager, which stops it and checks the exit status."""

    def __init__(self, *flags, log_path, models=(), pass_fds=(), program=None, descriptors=None,
                 own_addresses=False):
        self.log_path = pathlib.Path(log_path)
        command = [str(program or PREFILLD)]
        if not own_addresses:
            command += ["--listen=127.0.0.1:0", "--http=127.0.0.1:0"]
        if not any(flag.startswith("--backend=") for flag in flags):
            command.append("--backend=cpu")
        command += [f"--model={name}={path}" for name, path in models] + list(flags)
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True,
                                            pass_fds=pass_fds,
                                            preexec_fn=descriptors and limited_to(descriptors))
        try:
            self.target = self._announced(r"listening on (\S+:\d+)")
            super().__init__(self._announced(r"http on (\S+:\d+)"),
                             tls=any(flag.startswith("--tls_cert=") for flag in flags))
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.channel = grpc.insecure_channel(self.target, channel_options())
        self.prefill = prefill_service_pb2_grpc.PrefillServiceStub(self.channel)
        self.handoff = kv_handoff_service_pb2_grpc.KvHandoffServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def _announced(self, pattern):
        killer = threading.Timer(START_TIMEOUT_S, self.process.kill)
        killer.start()
        line = self.process.stdout.readline()
        killer.cancel()
        found = re.fullmatch(pattern + r"\n", line)
        if not found:
            raise RuntimeError(f"prefilld printed {line!r} instead of {pattern!r}; its log:\n"
                               + self.log_path.read_text())
        return found[1]

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        self.channel.close()
        if self.process.poll() is not None:
            raise AssertionError(f"prefilld died with {self.process.returncode}; its log:\n"
                                 + self.log_path.read_text()[-4000:])
        code = self.terminate()
        if kind is None:
            assert code == 0, f"exit {code}; its log:\n" + self.log_path.read_text()[-4000:]

    def terminate(self, timeout=30):
        """SIGTERM, then the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def wait(self, timeout=30):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def new_channel(self, options=()):
        return grpc.insecure_channel(self.target, [*channel_options(), *options])

    def footprint(self):
        """What must be the same again once all work is over."""
        samples = self.metrics()
        state = {name: total(samples, name) for name in RESTING}
        state["free blocks"] = total(samples, "prefilld_kv_blocks", state="free")
        return state

    def threads(self):
        return int(self._status_field("Threads"))

    def memory_kib(self, field):
        """VmRSS or VmHWM."""
        return int(self._status_field(field).split()[0])

    def _status_field(self, field):
        text = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return re.search(rf"^{field}:\s*(.*)$", text, re.M)[1]

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def limit_descriptors(self, soft):
        hard = resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (soft, hard))

    def log(self):
        """Every line of stderr, each of which must be one JSON object."""
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]


def limited_to(descriptors):
    """For a child before it runs: its soft and hard limit."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))


def unverified(client=None):
    """For whom it is of no interest who serves."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if client:
        context.load_cert_chain(*client)
    return context


def channel_options():
    return [("grpc.max_receive_message_length", 4 << 20), ("grpc.use_local_subchannel_pool", 1)]


def total(samples, name, **labels):
    wanted = set(labels.items())
    return sum(v for (n, pairs), v in samples.items() if n == name and wanted <= set(pairs))


def moved(before, after, name, **labels):
    return total(after, name, **labels) - total(before, name, **labels)


def eventually(condition, timeout=10, message="condition"):
    """Waits for a fact that another process makes true; returns its first true value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{message} did not come true within {timeout} s")
        time.sleep(0.01)


@contextlib.contextmanager
def leaves_nothing_behind(server):
    """After the block the server's work, memory, descriptors and threads are as before."""
    before, descriptors, threads = server.footprint(), server.descriptors(), server.threads()
    yield
    try:
        eventually(lambda: server.footprint() == before)
    except AssertionError:
        assert server.footprint() == before
    eventually(lambda: server.descriptors() <= descriptors,
               message=f"{server.descriptors()} descriptors back to {descriptors}")
    # gRPC's pools may keep as many as there are processors after a burst, never one per request.
    more = max(4, os.cpu_count() or 1)
    assert server.threads() <= threads + more, f"{server.threads()}, {threads} before"


def prefillctl(server, *arguments, check=True, timeout=300):
    """Runs the command line client; CompletedProcess with text output."""
    done = subprocess.run([str(PREFILLCTL), f"--target={server.target}", *map(str, arguments)],
                          capture_output=True, text=True, timeout=timeout)
    if check and done.returncode != 0:
        raise AssertionError(f"prefillctl {arguments}: {done.returncode}\n{done.stderr}")
    return done


class Failure:
    """The refusal of a call, with the details that a caller can act on."""

    def __init__(self, error):
        self.code = error.code()
        self.message = error.details()
        self.field = self.violation = self.resource = self.reason = self.retry_after = None
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                self._parse(status_pb2.Status.FromString(value))

    def _parse(self, status):
        assert status.code == self.code.value[0]
        for detail in status.details:
            for kind in (error_details_pb2.BadRequest, error_details_pb2.ResourceInfo,
                         error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo):
                if detail.Is(kind.DESCRIPTOR):
                    message = kind()
                    detail.Unpack(message)
                    self._take(message)

    def _take(self, message):
        if isinstance(message, error_details_pb2.BadRequest):
            self.field = message.field_violations[0].field
            self.violation = message.field_violations[0].description
        elif isinstance(message, error_details_pb2.ResourceInfo):
            self.resource = (message.resource_type, message.resource_name)
        elif isinstance(message, error_details_pb2.RetryInfo):
            self.retry_after = message.retry_delay.ToTimedelta().total_seconds()
        else:
            self.reason = message.reason

    def __repr__(self):
        return f"{self.code.name}: {self.message} {vars(self)}"


@contextlib.contextmanager
def refused(code, field=None):
    """Expects the block to end with this gRPC status; yields a list that gets the Failure.

    INVALID_ARGUMENT must name the field: `field` is a regular expression for its path.
    """
    caught = []
    try:
        yield caught
    except grpc.RpcError as error:
        failure = Failure(error)
    else:
        raise AssertionError(f"accepted, expected {code}")
    caught.append(failure)
    codes = code if isinstance(code, (tuple, set, list)) else (code,)
    assert failure.code in codes, failure
    assert failure.message, failure
    if failure.code == grpc.StatusCode.INVALID_ARGUMENT:
        assert failure.field and failure.violation, failure
    if field is not None:
        assert failure.field is not None and re.search(field, failure.field), failure
