"""The CUDA driver by ctypes: against a library of the test's own (fake_libcuda.c) what is called,
in which order and what is left; where there is a GPU, that memory of another process is mapped, and
stays when that process has let go of it. torch is not needed."""

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest

import fake_handout
from prefilld import PrefilldError, cuda_driver, cuda_ipc, memory_socket

MIB = 1 << 20
# Another process that makes 4 MiB of device memory, fills it with sevens and hands it out.
MAKER = textwrap.dedent("""
    import ctypes, sys, time
    sys.path[:0] = {path!r}
    import fake_handout
    from prefilld.cuda_driver import Driver, _Properties, _Location, _AllocationFlags
    driver = Driver()
    handout = fake_handout.Handout()
    class Memory: pass
    with driver._on(0):
        def made(size, byte):
            memory = Memory()
            handle, fd = ctypes.c_uint64(), ctypes.c_int()
            properties = _Properties(1, 1, _Location(1, 0), None, _AllocationFlags())
            for name, kinds in {{
                    "cuMemCreate": [ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t,
                                    ctypes.POINTER(_Properties), ctypes.c_ulonglong],
                    "cuMemExportToShareableHandle": [ctypes.POINTER(ctypes.c_int),
                                                     ctypes.c_uint64, ctypes.c_int,
                                                     ctypes.c_ulonglong]}}.items():
                getattr(driver._cuda, name).argtypes = kinds
            driver._call("cuMemCreate", handle, size, properties, 0)
            driver._call("cuMemExportToShareableHandle", fd, handle, 1, 0)
            memory.file, memory.size = fd.value, size
            memory.mapped = driver.map(fd.value, size, 0)
            driver.write(memory.mapped, 0, bytes([byte]) * size)
            driver._call("cuMemRelease", handle)
            return memory
        memory = made({size}, 7)
        handout.memories = {{"sevens": memory, "probe": made(2 << 20, 0)}}
    print(handout.path, flush=True)
    sys.stdin.readline()
    driver.unmap(memory.mapped)
    print("let go", flush=True)
    sys.stdin.readline()
    print(*handout.in_use(), flush=True)
    sys.stdin.readline()
    print(handout.idle(), flush=True)
""")


def test_the_structures_are_the_drivers():
    """As cuda.h has had them from 11 to 13."""
    assert ctypes.sizeof(cuda_driver._Location) == 8
    assert ctypes.sizeof(cuda_driver._Access) == 12
    assert ctypes.sizeof(cuda_driver._Properties) == 32
    for field, offset in (("handle_types", 4), ("location", 8), ("win32_meta_data", 16),
                          ("flags", 24)):
        assert getattr(cuda_driver._Properties, field).offset == offset
    assert cuda_driver._AllocationFlags.usage.offset == 2
    assert cuda_driver._Access.flags.offset == 8


def test_no_driver_is_a_refusal(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(PrefilldError, match="there is no CUDA driver here: libcuda") as caught:
        cuda_driver.Driver()
    assert caught.value.reason == "REASON_DRIVER"


# --- the calls


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    made = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    source = pathlib.Path(__file__).with_name("fake_libcuda.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", made, source],
                   check=True)
    return made


@pytest.fixture
def fake(library, tmp_path, monkeypatch):
    """The library, loaded anew; afterwards nothing is left in it."""
    copy = shutil.copy(library, tmp_path / "libcuda.so.1")
    loaded = ctypes.CDLL(str(copy))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: loaded)
    yield Fake(loaded)
    assert Fake(loaded).left() == (0, 0, 0, 0)


class Fake:
    def __init__(self, loaded):
        self._loaded = loaded

    def set(self, name, value):
        ctypes.c_int.in_dll(self._loaded, f"fake_{name}").value = value

    def fail(self, call, error=999):
        (ctypes.c_char * 64).in_dll(self._loaded, "fake_fails").value = call.encode()
        self.set("error", error)

    def left(self):
        return tuple(ctypes.c_int.in_dll(self._loaded, f"fake_{name}").value
                     for name in ("depth", "imported", "reserved", "mapped"))

    def calls(self):
        """Since the last time."""
        log = (ctypes.c_char * 4096).in_dll(self._loaded, "fake_log")
        found, log.value = log.value.decode().split(), b""
        return found


@pytest.fixture
def memory():
    made = fake_handout.Memory([3 * fake_handout.PAGE], "GPU-1")
    made.array[:] = 7
    return made


@pytest.mark.parametrize("owner", [0, 1])
def test_calls_and_their_order(fake, memory, owner):
    fake.set("owner", owner)
    driver = cuda_driver.Driver()
    mapped = driver.map(memory.file, memory.size, 0)
    reach = ["access(0)", "access(1)"][:1 + owner]
    assert fake.calls() == [
        "retain(0)", "import(1)", "properties(0)", "granularity(0)", f"reserve({memory.size})",
        f"map({memory.size})", *reach, "release(0)"]
    assert mapped.gpus == ((0,), (0, 1))[owner] and mapped.size == memory.size
    assert fake.left() == (0, 0, 1, 1)
    driver.write(mapped, 64, b"eight")
    assert driver.read(mapped, 63, 7) == b"\7eight\7"
    assert memory.array[64:69].tobytes() == b"eight"
    fake.calls()
    driver.unmap(mapped)  # not before either GPU has done what it was given to do
    assert fake.calls() == ["synchronize(0)", *["retain(1)", "synchronize(1)"][:2 * owner],
                            f"unmap({memory.size})", f"free({memory.size})"]


@pytest.mark.parametrize("call", ["retain", "import", "properties", "granularity", "reserve", "map",
                                  "access"])
@pytest.mark.parametrize(("error", "reason"), [(999, "REASON_DRIVER"), (1, None)])
def test_a_call_that_fails_leaves_nothing(fake, memory, call, error, reason):
    fake.fail(call, error)
    reason = reason or ("REASON_DESCRIPTOR" if call in ("import", "map") else "REASON_DRIVER")
    with pytest.raises(PrefilldError, match=f"as the test wants it .CUresult {error}") as caught:
        cuda_driver.Driver().map(memory.file, memory.size, 0)
    assert caught.value.reason == reason
    assert fake.left() == (0, 0, 0, 0)


def test_what_is_not_as_was_said(fake, memory):
    driver = cuda_driver.Driver()
    for descriptor, size in ((memory.file, memory.size + 4096), (memory.file, memory.size - 1),
                             (memory.file, 1 << 62), (0, memory.size), (-1, memory.size)):
        with pytest.raises(PrefilldError) as caught:
            driver.map(descriptor, size, 0)
        assert caught.value.reason in ("REASON_DESCRIPTOR", "REASON_DRIVER")
        assert fake.left() == (0, 0, 0, 0)
    fake.set("location_type", 2)  # the host's memory
    with pytest.raises(PrefilldError, match="at a location of type 2"):
        driver.map(memory.file, memory.size, 0)


def test_a_gpu_that_broke_down_is_let_go_of(fake, memory):
    driver = cuda_driver.Driver()
    mapped = driver.map(memory.file, memory.size, 0)
    fake.fail("synchronize", 700)
    driver.unmap(mapped)


# --- a GPU


@pytest.fixture
def driver():
    try:
        return cuda_driver.driver()
    except PrefilldError as error:
        pytest.skip(str(error))


@pytest.fixture
def maker(driver):
    folder = os.path.dirname(fake_handout.__file__)
    process = subprocess.Popen(
        [sys.executable, "-c", MAKER.format(path=[folder, *sys.path], size=4 * MIB)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.path = process.stdout.readline().strip()
    yield process
    process.kill()
    process.wait()


def say(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_memory_of_another_process(driver, maker):
    connection, descriptor, size = memory_socket.receive(maker.path, "sevens")
    memory = driver.map(descriptor, size, 0)
    os.close(descriptor)
    assert (size, memory.size) == (4 * MIB, 4 * MIB) and memory.gpus[0] == 0
    assert say(maker) == "let go"
    assert driver.read(memory, size - 64, 64) == bytes([7]) * 64
    driver.write(memory, 64, b"eight")
    assert driver.read(memory, 63, 7) == b"\7eight\7"
    assert say(maker) == "sevens"
    driver.unmap(memory)
    connection.close()
    assert say(maker) == "True"


def test_what_is_less_than_was_said_or_something_else(driver, maker):
    connection, descriptor, size = memory_socket.receive(maker.path, "sevens")
    with connection, open("/dev/null", "rb") as nothing:
        for file, said in ((descriptor, 64 * MIB), (descriptor, size + 1), (nothing.fileno(), size),
                           (os.memfd_create("memory"), size)):
            with pytest.raises(PrefilldError) as caught:
                driver.map(file, said, 0)
            assert caught.value.reason in ("REASON_DESCRIPTOR", "REASON_DRIVER")
        memory = driver.map(descriptor, size, 0)  # nothing of all that is left
        driver.unmap(memory)
    os.close(descriptor)


def test_the_probe(driver, maker):
    class Device:
        index = 0

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        cuda_ipc.probe(maker.path, Device)
    assert len(os.listdir("/proc/self/fd")) == before
