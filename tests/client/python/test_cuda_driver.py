"""The CUDA driver by ctypes. Where there is a GPU: memory of another process is mapped, and stays
when that process has let go of it. torch is not needed."""

import ctypes
import os
import subprocess
import sys
import textwrap

import pytest

import fake_handout
from prefilld import PrefilldError, cuda_driver, cuda_ipc, cuda_socket

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
    connection, descriptor, size = cuda_socket.receive(maker.path, "sevens")
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
    connection, descriptor, size = cuda_socket.receive(maker.path, "sevens")
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
