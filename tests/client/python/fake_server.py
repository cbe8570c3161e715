"""A prefilld made of plain Python that misbehaves on request.

Each RPC takes the next entry of its list in `faults`, if there is one, and does as that says;
otherwise it answers well. Attend returns q as o. The cache of a prompt is made of the numbers that
`expected_layer` computes. With `shm` it offers posix_shm, with `gpu` cuda_ipc, with memory of that
GPU that a fake driver maps; `handout` hands out both.
"""

import collections
import threading
from concurrent import futures

import google_crc32c
import grpc
import numpy as np
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from fake_handout import Handout, Memory
from prefilld import cuda_ipc, shm
from prefilld.v1 import (kv_handoff_service_pb2 as kv, kv_handoff_service_pb2_grpc,
                         model_service_pb2, model_service_pb2_grpc, prefill_service_pb2 as pb,
                         prefill_service_pb2_grpc, sparsity_pb2, tensor_pb2)

LAYERS, KV_HEADS, HEAD_DIM, VOCAB = 3, 2, 4, 11
CHUNK = 40  # bytes at least: several chunks a tensor
MODEL = "tiny"


def expected_layer(index, tokens):
    """K and V of a layer of the fake's cache, [kv_heads, tokens, head_dim]."""
    k = np.arange(KV_HEADS * tokens * HEAD_DIM, dtype=np.float32).reshape(KV_HEADS, tokens, -1)
    return k + 1000 * index, -k - 1000 * index


class Abort:
    """A fault: end the call with this status, after `after` chunks where chunks are sent."""

    def __init__(self, code, *details, after=0):
        self.code, self.details, self.after = code, details, after

    def raise_in(self, context):
        status = status_pb2.Status(code=self.code.value[0], message="as scripted")
        for detail in self.details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        context.set_trailing_metadata(
            (("grpc-status-details-bin", status.SerializeToString()),) if self.details else ())
        context.abort(self.code, "as scripted")


class Tamper:
    """A fault: pass every chunk that is sent through `change(number, chunk)`; None drops it."""

    def __init__(self, change):
        self.change = change


class Hang:
    """A fault: send nothing more until the call is over."""


class Silence:
    """A fault: send nothing at all until the call is over, which `over` then tells."""

    def __init__(self):
        self.over = threading.Event()


def retry_info(seconds):
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(int(seconds * 1000))
    return info


def chunks_of(array, index, layer=0, offset=0):
    data = np.ascontiguousarray(array).tobytes()
    size = max(CHUNK, len(data) // 100)  # a large one in no more than 100
    for at in range(offset, len(data), size):
        piece = data[at:at + size]
        yield tensor_pb2.TensorChunk(
            tensor_index=index, layer=layer, byte_offset=at, crc32c=google_crc32c.value(piece),
            last=at + len(piece) == len(data), data=piece)


class FakeServer(prefill_service_pb2_grpc.PrefillServiceServicer,
                 kv_handoff_service_pb2_grpc.KvHandoffServiceServicer,
                 model_service_pb2_grpc.ModelServiceServicer):

    def __init__(self, credentials=None):
        """credentials: grpc's, of a server; default: in the clear."""
        self.authorization = []                      # what calls said of themselves, or None
        self.faults = collections.defaultdict(list)  # RPC name -> what the next calls do
        self.calls = collections.defaultdict(list)   # RPC name -> requests as they came
        self.data_type = tensor_pb2.DATA_TYPE_F32    # of the cache
        self.ttl_s = 60.0
        self.layer_gate = None                       # a semaphore: one permit per layer
        self.bytes_before_admission = 0
        self.renewed = threading.Semaphore(0)        # one permit per renewal
        self.shm = False                             # offer posix_shm
        self.shm_domain = shm.domain()
        self.gpu = None                              # offer cuda_ipc, on this one
        self.handout = Handout()
        self.cuda_ipc_domain = cuda_ipc.domain()
        self.device_caches = {}                      # by the lease's name
        self.keeps_on_device = True                  # caches as well
        self.boot_id = "boot"
        self.segments = {}                           # memory of caches, by the lease's name
        self.change_buffers = None                   # Attend: what to do with Admission.buffers
        self._threads = futures.ThreadPoolExecutor(8)
        self._server = grpc.server(self._threads)
        prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server(self, self._server)
        kv_handoff_service_pb2_grpc.add_KvHandoffServiceServicer_to_server(self, self._server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        port = (self._server.add_insecure_port("127.0.0.1:0") if credentials is None
                else self._server.add_secure_port("127.0.0.1:0", credentials))
        self.target = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self):
        self._server.stop(0).wait()
        self._threads.shutdown()  # who serves a call that broke may still be at it

    # --- PrefillService

    def Attend(self, requests, context):
        header = next(requests).header
        self.calls["Attend"].append(header)
        fault = self._start("Attend", context)
        if header.transport == kv.TRANSPORT_POSIX_SHM:
            yield from self._attend_mapped(header, requests, fault, context)
            return
        if header.transport == kv.TRANSPORT_CUDA_IPC:
            yield from self._attend_on_device(header, requests, fault, context)
            return
        arrived = threading.Event()
        parts = [[] for _ in header.tensors]
        total = sum(4 * int(np.prod(spec.shape)) for spec in header.tensors)

        def receive():
            done = 0
            for request in requests:
                arrived.set()
                parts[request.chunk.tensor_index].append(request.chunk)
                done += len(request.chunk.data)
                if done == total:
                    return

        reader = threading.Thread(target=receive, daemon=True)
        reader.start()
        self.bytes_before_admission += arrived.wait(0.05)
        yield pb.AttendResponse(admission=pb.Admission(request_id=header.request_id))
        reader.join(timeout=10)
        for chunks in parts:
            assert all(google_crc32c.value(c.data) == c.crc32c for c in chunks)
            assert len(chunks[0].data) <= 1 << 20
        self.uploaded = [b"".join(c.data for c in chunks) for chunks in parts]

        spec = header.tensors[0]
        o = np.frombuffer(self.uploaded[0], "<f4" if len(self.uploaded[0]) == 4 * np.prod(
            spec.shape) else "<u2").reshape(tuple(spec.shape))
        yield pb.AttendResponse(outputs=pb.OutputSpecs(tensors=[tensor_pb2.TensorSpec(
            name="o", data_type=spec.data_type, shape=spec.shape)]))
        for chunk in self._send(chunks_of(o, 0), fault, context):
            yield pb.AttendResponse(chunk=chunk)
        yield pb.AttendResponse(summary=self._summary(header.request_id, o.shape[0], 1))

    def _attend_mapped(self, header, requests, fault, context):
        if not self.shm:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "posix_shm is not offered")
        width = 2 if header.tensors[0].data_type == tensor_pb2.DATA_TYPE_BF16 else 4
        sizes = [width * int(np.prod(spec.shape)) for spec in header.tensors]
        memory = self.handout.share(Memory(sizes + sizes[:1]))
        try:
            buffers = [memory.reference(i) for i in range(3)]
            if self.change_buffers is not None:
                buffers = self.change_buffers(buffers)
            yield pb.AttendResponse(admission=pb.Admission(
                request_id=header.request_id, transport=kv.TRANSPORT_POSIX_SHM, buffers=buffers))
            part = next(requests)
            assert part.WhichOneof("part") == "written", part
            self.uploaded = [memory.place(i).tobytes() for i in range(3)]
            memory.place(3)[:] = memory.place(0)
            spec = header.tensors[0]
            outputs = pb.OutputSpecs(
                tensors=[tensor_pb2.TensorSpec(name="o", data_type=spec.data_type,
                                               shape=spec.shape)],
                buffers=[memory.reference(3)])
            yield pb.AttendResponse(
                outputs=fault.change(0, outputs) if isinstance(fault, Tamper) else outputs)
            yield pb.AttendResponse(summary=self._summary(header.request_id, spec.shape[0], 1))
        finally:
            self.handout.end(memory)

    def _attend_on_device(self, header, requests, fault, context):
        if self.gpu is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "cuda_ipc is not offered")
        width = 4 if header.tensors[0].data_type == tensor_pb2.DATA_TYPE_F32 else 2
        sizes = [width * int(np.prod(spec.shape)) for spec in header.tensors]
        memory = self.handout.share(Memory(sizes + sizes[:1] + [12], self.gpu))
        buffers = [memory.reference(i) for i in range(3)]
        if self.change_buffers is not None:
            buffers = self.change_buffers(buffers)
        yield pb.AttendResponse(admission=pb.Admission(
            request_id=header.request_id, transport=kv.TRANSPORT_CUDA_IPC, buffers=buffers))
        part = next(requests, None)
        if part is None:  # the caller goes without a word
            return
        assert part.WhichOneof("part") == "written", part
        self.uploaded = [memory.place(i).tobytes() for i in range(3)]
        memory.place(3)[:] = memory.place(0)
        memory.place(4)[:] = np.arange(3, dtype="<i4").view(np.uint8)
        spec = header.tensors[0]
        outputs = pb.OutputSpecs(
            tensors=[tensor_pb2.TensorSpec(name="o", data_type=spec.data_type, shape=spec.shape),
                     tensor_pb2.TensorSpec(name="block_count", shape=[3],
                                           data_type=tensor_pb2.DATA_TYPE_I32)],
            buffers=[memory.reference(3), memory.reference(4)])
        if isinstance(fault, Abort):
            fault.raise_in(context)
        yield pb.AttendResponse(
            outputs=fault.change(0, outputs) if isinstance(fault, Tamper) else outputs)
        yield pb.AttendResponse(summary=self._summary(header.request_id, spec.shape[0], 1))

    def Prefill(self, request, context):
        self.calls["Prefill"].append(request)
        fault = self._start("Prefill", context)
        tokens = len(request.token_ids)
        lease = self._lease(request.request_id, tokens)
        transport = request.destination.transport
        if transport == kv.TRANSPORT_CUDA_IPC:
            self._fill(self.device_caches, lease, self.gpu)
        mapped = (self.shm and request.destination.retain
                  and transport not in (kv.TRANSPORT_GRPC, kv.TRANSPORT_CUDA_IPC))
        if mapped:
            self._fill(self.segments, lease)
        there = self.device_caches.get(lease.name) if transport == kv.TRANSPORT_CUDA_IPC else None
        yield pb.PrefillEvent(admission=pb.Admission(
            request_id=request.request_id, lease=lease,
            buffers=[] if there is None else [there.reference(0)],
            transport=transport if transport == kv.TRANSPORT_CUDA_IPC
            else kv.TRANSPORT_POSIX_SHM if mapped else kv.TRANSPORT_GRPC))
        if isinstance(fault, Hang):
            self._hang(context)
        for layer in range(LAYERS):
            if isinstance(fault, Abort) and layer == fault.after:
                fault.raise_in(context)
            yield pb.PrefillEvent(layer_ready=pb.LayerReady(
                layer=layer, density=0.25 * (layer + 1), captured_mass=0.9))
        if request.return_logits:
            yield pb.PrefillEvent(logits=pb.Logits(
                vocab_size=VOCAB, f32=np.arange(VOCAB, dtype="<f4").tobytes()))
        yield pb.PrefillEvent(kv_ready=self._lease(request.request_id, tokens))
        yield pb.PrefillEvent(summary=self._summary(request.request_id, tokens, LAYERS))

    def GetSparsityReport(self, request, context):
        self._start("GetSparsityReport", context)
        return self._summary(request.request_id, 1, LAYERS).sparsity

    # --- KvHandoffService

    def PullKv(self, request, context):
        self.calls["PullKv"].append(request)
        fault = self._start("PullKv", context)
        tokens = int(request.lease.split("/")[1])
        places = {kv.TRANSPORT_POSIX_SHM: self.segments,
                  kv.TRANSPORT_CUDA_IPC: self.device_caches}.get(request.transport)
        if places is not None and (request.lease not in places
                                   or request.layout.data_type not in (0, self.data_type)):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the cache lies in no segment")
        if places is None and request.lease in self.device_caches:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the cache is not sent")

        def chunks():
            for layer in range(request.first_layer, LAYERS):
                if self.layer_gate is not None:
                    self.layer_gate.acquire()
                first = layer == request.first_layer
                for index, array in enumerate(expected_layer(layer, tokens)):
                    if first and index < request.resume_tensor_index:
                        continue
                    if places is not None:
                        yield tensor_pb2.TensorChunk(
                            tensor_index=index, layer=layer, last=True,
                            buffer=places[request.lease].reference(2 * layer + index))
                        continue
                    resumed = first and index == request.resume_tensor_index
                    yield from chunks_of(self._as_stored(array, request.layout.data_type),
                                         index, layer, request.resume_byte_offset if resumed else 0)

        yield from self._send(chunks(), fault, context)

    def RenewLease(self, request, context):
        self.renewed.release()
        self._start("RenewLease", context)
        return self._lease(*request.lease.split("/"))

    def ReleaseLease(self, request, context):
        self.calls["ReleaseLease"].append(request)
        self._start("ReleaseLease", context)
        if request.lease in self.segments:
            self.handout.end(self.segments.pop(request.lease))
        return kv.ReleaseLeaseResponse()

    def Negotiate(self, request, context):
        self.calls["Negotiate"].append(request)
        self._start("Negotiate", context)
        transport = kv.TRANSPORT_GRPC
        on_device = (self.gpu is not None and self.gpu in request.device_uuids
                     and request.cuda_ipc_domain == self.cuda_ipc_domain
                     and (self.keeps_on_device or not request.model)
                     and not any(refusal.transport == kv.TRANSPORT_CUDA_IPC
                                 for refusal in request.refused))
        if kv.TRANSPORT_CUDA_IPC in request.transports and not on_device:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "cuda_ipc is not possible here")
        if on_device and (not request.transports or kv.TRANSPORT_CUDA_IPC in request.transports):
            transport = kv.TRANSPORT_CUDA_IPC
        elif kv.TRANSPORT_GRPC not in request.transports:
            if (self.shm and request.shm_domain == self.shm_domain
                    and not any(refusal.transport == kv.TRANSPORT_POSIX_SHM
                                for refusal in request.refused)):
                transport = kv.TRANSPORT_POSIX_SHM
            elif kv.TRANSPORT_POSIX_SHM in request.transports:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, "posix_shm is not possible here")
        return kv.NegotiateResponse(
            transport=transport, fingerprint="f" * 64, boot_id=self.boot_id,
            shm_domain=self.shm_domain if self.shm else "",
            memory_socket=self.handout.path if self.shm or self.gpu else "",
            **({} if self.gpu is None else {
                "cuda_ipc_domain": self.cuda_ipc_domain, "device_uuids": [self.gpu]}))

    # --- ModelService

    def GetModel(self, request, context):
        if request.name != MODEL:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.name}")
        return self._model()

    def ListModels(self, request, context):
        self._start("ListModels", context)
        return model_service_pb2.ListModelsResponse(models=[self._model()])

    # --- parts

    def _start(self, rpc, context):
        """The fault of this call; raised here when it comes before the first answer."""
        self.authorization.append(dict(context.invocation_metadata()).get("authorization"))
        fault = self.faults[rpc].pop(0) if self.faults[rpc] else None
        if isinstance(fault, Abort) and fault.after == 0:
            fault.raise_in(context)
        if isinstance(fault, Silence):
            self._hang(context)
            fault.over.set()
        return fault

    def _send(self, chunks, fault, context):
        for number, chunk in enumerate(chunks):
            if isinstance(fault, Abort) and number == fault.after:
                fault.raise_in(context)
            if isinstance(fault, Hang):
                self._hang(context)
            if isinstance(fault, Tamper):
                chunk = fault.change(number, chunk)
            if chunk is not None:
                yield chunk

    def _hang(self, context):
        over = threading.Event()
        context.add_callback(over.set)
        over.wait(10)

    def _as_stored(self, array, kind=0):
        kind = kind or self.data_type
        if kind == tensor_pb2.DATA_TYPE_BF16:
            return (array.view(np.uint32) >> 16).astype("<u2")
        return array.astype("<f2" if kind == tensor_pb2.DATA_TYPE_F16 else "<f4")

    def _fill(self, memories, lease, gpu=""):
        if lease.name not in memories:
            arrays = self._stored(lease)
            memory = self.handout.share(Memory([a.nbytes for a in arrays], gpu))
            for index, array in enumerate(arrays):
                memory.put(index, array)
            memories[lease.name] = memory

    def _stored(self, lease):
        return [self._as_stored(array) for layer in range(LAYERS)
                for array in expected_layer(layer, lease.tokens)]

    def _lease(self, request_id, tokens):
        ttl = duration_pb2.Duration()
        ttl.FromMilliseconds(int(self.ttl_s * 1000))
        return kv.Lease(name=f"{request_id.split('/')[0]}/{tokens}", generation=7,
                        boot_id=self.boot_id, layers=LAYERS, tokens=int(tokens), ttl=ttl)

    def _model(self):
        return model_service_pb2.Model(name=MODEL, layers=LAYERS, kv_heads=KV_HEADS,
                                       head_dim=HEAD_DIM, data_type=self.data_type)

    def _summary(self, request_id, tokens, layers):
        heads = 2
        half = np.full((layers, heads), 32768, "<u2").tobytes()
        summary = pb.Summary(request_id=request_id, tokens=tokens, sparsity=(
            sparsity_pb2.SparsityReport(
                mean_density=0.5, layers=layers, heads=heads, density_u16=half,
                pattern_u8=bytes([3] * layers * heads), captured_mass_u16=half,
                captured_mass_min_u16=half, mean_captured_mass=0.9, captured_mass_measured=True)))
        summary.attention.FromMilliseconds(1500)
        return summary
