"""What keeps a server from starting: one clear line on stderr, the last, behind what the log told
until then; exit status 1, nothing on stdout."""

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess

import grpc
import pytest

from e2e import checkpoints, harness, prefilling, safetensors_file
from prefilld.v1 import kv_handoff_service_pb2 as kv
from prefilld.v1.model_service_pb2 import GetModelRequest


def refusal(stderr):
    """The one line that is not the log's."""
    *log, last = stderr.strip().splitlines()
    assert all("event" in json.loads(line) for line in log), stderr
    return last


def start_fails(*flags, words=(), listen="127.0.0.1:0", http="127.0.0.1:0"):
    done = subprocess.run([str(harness.PREFILLD), f"--listen={listen}", f"--http={http}",
                           "--backend=cpu", *flags],
                          capture_output=True, text=True, timeout=20)
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert done.stdout == ""
    line = refusal(done.stderr)
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"


@pytest.mark.parametrize("flag,words", [
    ("--no_such_flag", ["no_such_flag"]),
    ("--kv_memory=lots", ["kv_memory", "lots"]),
    ("--kv_memory=-1GiB", ["kv_memory"]),
    ("--kv_memory=99999999999999999999GiB", ["kv_memory"]),
    ("--backend=tpu", ["tpu"]),
    ("--listen=nowhere", ["nowhere"]),
    ("--listen=127.0.0.1:99999", ["99999"]),
    ("--http=127.0.0.1:-2", ["-2"]),
    ("--model=justaname", ["justaname"]),
    ("--model=a\udcff=/", [r"a\xff", "UTF-8"]),
    ("--model=a=/no/such/directory", ["/no/such/directory"]),
    ("--config=/no/such/file", ["/no/such/file"]),
])
def test_bad_flags(flag, words):
    # The last of two equal options counts, or two of them are an error; either way it is refused.
    listen = None if flag.startswith("--listen") else "127.0.0.1:0"
    http = None if flag.startswith("--http") else "127.0.0.1:0"
    command = [str(harness.PREFILLD), flag]
    command += [f"--listen={listen}"] if listen else []
    command += [f"--http={http}"] if http else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, (done.returncode, done.stderr)
    line = refusal(done.stderr)
    assert all(word in line for word in words), line


def test_a_start_that_fails_waits_for_no_reader():
    """stderr is a pipe that is full."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    try:
        done = subprocess.run([str(harness.PREFILLD), "--backend=tpu"], stderr=writer, timeout=30)
        assert done.returncode == 1
    finally:
        os.close(reader)
        os.close(writer)


def test_the_image_is_closed_until_it_is_told_otherwise():
    """What it starts adds no flag to the defaults, which are loopback's."""
    text = (harness.ROOT / "Dockerfile").read_text()
    assert re.findall(r"^(?:ENTRYPOINT|CMD) (.*)", text, re.M) == ['["prefilld"]']
    start_fails(listen="0.0.0.0:0", words=["--listen=0.0.0.0:0", "--tls_cert", "--insecure_listen"])
    start_fails(http="[::]:0", words=["--http=[::]:0", "--tls_cert", "--insecure_listen"])


def test_two_models_of_one_name(tiny):
    start_fails(f"--model=a={tiny.directory}", f"--model=a={tiny.directory}", words=["a"])


@pytest.mark.parametrize("which", ["listen", "http"])
def test_port_in_use(which):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        start_fails(**{which: f"127.0.0.1:{port}"}, words=[port])


def test_two_servers_on_one_port(start_server):
    with start_server() as server:
        start_fails(listen=server.target, words=[server.target.split(":")[1]])


def test_too_little_memory(tiny):
    start_fails("--kv_memory=900TiB", f"--model=a={tiny.directory}", words=["kv_memory"])


# 4 layers of blocks of 128 KiB, each of 128 tokens.
@pytest.mark.parametrize("kv_memory", ["1KiB", "511KiB"])
def test_memory_for_no_prompt_is_refused_with_what_is_needed(start_server, tiny, kv_memory):
    start_fails(f"--kv_memory={kv_memory}", f"--model=a={tiny.directory}",
                words=["--kv_memory: ", "no prompt of model 'a'", "--kv_memory=512KiB would"])
    with start_server("--kv_memory=512KiB", models=[("tiny", tiny.directory)]) as server:
        with prefilling.prefilled(server, tiny.tokens(128)) as done:
            assert done.summary


# --- how long a prompt may be ---------------------------------------------------------------------


def longest(server, model="tiny"):
    return server.models.GetModel(GetModelRequest(name=model)).max_prompt_tokens


@pytest.mark.parametrize("flags,limit,helps", [
    (["--max_prompt_tokens=3000", "--kv_memory=4MiB"], "kv_memory: one cache of model 'tiny' may "
     "hold 2048, if it passes through (retain = false)",
     "what helps: --max_prompt_tokens=2048, --kv_memory=6MiB"),
    (["--max_prompt_tokens=20000"], "model: none has more than 16384 positions",
     "what helps: --max_prompt_tokens=16384"),
])
def test_a_limit_that_cannot_be_served_is_refused_with_one_that_can(start_server, tiny, flags,
                                                                    limit, helps):
    done = subprocess.run([str(harness.PREFILLD), "--listen=127.0.0.1:0", "--http=127.0.0.1:0",
                           "--backend=cpu", f"--model=tiny={tiny.directory}", *flags],
                          capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stdout == ""
    line = refusal(done.stderr)
    assert line.startswith("prefilld: --max_prompt_tokens: ") and limit in line
    assert line.endswith(helps), line
    table = [json.loads(row) for row in done.stderr.splitlines()[:-1]]
    assert {"weights", "kv_blocks", "block_index"} <= {
        row["what"] for row in table if row["event"] == "memory_plan"}
    taken = dict(flag.split("=") for flag in flags)  # each of the flags that help does
    for flag in helps.removeprefix("what helps: ").split(", "):
        name, value = flag.split("=")
        with start_server(*[f"{n}={v}" for n, v in (taken | {name: value}).items()],
                          models=[("tiny", tiny.directory)]) as server:
            limits = server.handoff.Negotiate(kv.NegotiateRequest(model="tiny")).limits
            assert limits.max_unretained_prompt_tokens >= 2048


def test_what_is_advertised_is_served_and_no_more(start_server, tiny):
    with start_server("--kv_memory=4MiB", models=[("tiny", tiny.directory)]) as server:
        assert longest(server) == 1024
        limits = server.handoff.Negotiate(kv.NegotiateRequest(model="tiny")).limits
        assert limits.max_prompt_tokens == 1024
        assert limits.max_unretained_prompt_tokens == 2048  # in the room of two layers
        assert server.handoff.Negotiate(kv.NegotiateRequest()).limits.max_prompt_tokens == 1024
        with prefilling.prefilled(server, tiny.tokens(1024)) as done:
            assert done.summary
        with harness.refused(grpc.StatusCode.INVALID_ARGUMENT, "token_ids"):
            prefilling.start(server, tiny.tokens(1025))
        told, = [line for line in server.log() if line["event"] == "max_prompt_tokens_lowered"]
        assert (told["level"], told["model"], told["max_prompt_tokens"], told["wanted"]) == (
            "warning", "tiny", 1024, 16384)
        assert (told["limit"], told["needs"]) == ("kv_memory", "--kv_memory=64MiB")


def test_the_longest_prompt_fits_into_a_message(start_server, tmp_path):
    tokens = 2**20
    model = checkpoints.Checkpoint.create(tmp_path / "long", num_hidden_layers=1,
                                          max_position_embeddings=tokens)
    with start_server(f"--max_prompt_tokens={tokens}", "--kv_memory=1GiB",
                      models=[("long", model.directory)]) as server:
        assert longest(server, "long") == tokens
        ids = [model.config["vocab_size"] - 1] * tokens  # two bytes each

        def validate(token_ids):
            prefilling.Prefill(server.prefill, prefilling.request(
                token_ids, model="long", validate_only=True)).finish()

        validate(ids)
        with harness.refused(grpc.StatusCode.INVALID_ARGUMENT, "token_ids"):
            validate([*ids, 0])
        with harness.refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            validate(ids + ids[:600_000])


def test_a_limit_that_fits_is_taken(start_server, tiny):
    with start_server("--kv_memory=4MiB", "--max_prompt_tokens=1000",
                      models=[("tiny", tiny.directory)]) as server:
        assert longest(server) == 1000
        assert not any("lowered" in line["event"] for line in server.log())
        with harness.refused(grpc.StatusCode.INVALID_ARGUMENT, "token_ids"):
            prefilling.start(server, tiny.tokens(1001), retain=False)


def test_the_plan_of_a_cpu_says_what_is_true_there(start_server, tiny):
    with start_server("--kv_memory=4MiB", models=[("tiny", tiny.directory)]) as server:
        rows = {row["what"]: row for row in server.log() if row["event"] == "memory_plan"}
        loaded, = [line for line in server.log() if line["event"] == "model_loaded"]
        assert server.metric("prefilld_memory_plan_bytes", what="kv_blocks") == 4 << 20
    assert all(row["bytes"] > 0 and row["place"] == "host" for row in rows.values())
    assert rows["weights"]["taken"] == "mapped"
    assert rows["weights"]["bytes"] == loaded["bytes"] == sum(
        array.nbytes for array in tiny.weights.values())
    assert {row["taken"] for what, row in rows.items() if what != "weights"} == {"as calls come"}
    assert "gb_per_s" not in loaded  # nothing was read but for the fingerprint
    assert loaded["fingerprint_seconds"] >= 0


# --- while models load ----------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def connects(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def loading(model):
    """(process, port): it loads until it is told to stop, for its config.json is a pipe that nobody
    writes to."""
    (model.directory / "config.json").unlink()
    os.mkfifo(model.directory / "config.json")
    port, http = free_port(), free_port()
    process = subprocess.Popen(
        [str(harness.PREFILLD), f"--listen=127.0.0.1:{port}", f"--http=127.0.0.1:{http}",
         "--backend=cpu", f"--model=b={model.directory}"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    harness.eventually(lambda: connects(http))
    yield process, port
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_server_that_loads(loading, number):
    process, _ = loading
    process.send_signal(number)
    out, log = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "")
    assert json.loads(log.splitlines()[-1])["while"] == "starting"


def test_a_port_that_a_loading_server_will_have_is_refused_at_once(loading):
    _, port = loading
    start_fails(listen=f"127.0.0.1:{port}", words=["--listen", str(port), "another prefilld"])


def test_one_port_for_both_is_refused():
    port = free_port()
    start_fails(listen=f"127.0.0.1:{port}", http=f"127.0.0.1:{port}",
                words=["--listen and --http are both", str(port)])


def model_is_loaded(scrape, model):
    loaded, every = (harness.total(scrape, "prefilld_model_bytes", model=model, state=state)
                     for state in ("loaded", "all"))
    return 0 < loaded == every


def test_until_all_models_are_loaded_http_alone_answers(tiny, model):
    """The second model's config.json is a pipe: who reads it waits for who writes it."""
    config = (model.directory / "config.json")
    text = config.read_text()
    config.unlink()
    os.mkfifo(config)
    port, http = free_port(), free_port()
    process = subprocess.Popen(
        [str(harness.PREFILLD), f"--listen=127.0.0.1:{port}", f"--http=127.0.0.1:{http}",
         "--backend=cpu", f"--model=a={tiny.directory}", f"--model=b={model.directory}"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        server = harness.HttpPort(f"127.0.0.1:{http}")
        harness.eventually(lambda: connects(http))
        harness.eventually(lambda: model_is_loaded(server.metrics(), "a"))
        assert server.metric("prefilld_ready") == 0
        assert server.metric("prefilld_model_bytes", model="b") == 0
        assert not connects(port)
        start_fails(listen=f"127.0.0.1:{http}", words=["--listen", "Address already in use"])
        with socket.socket() as other, pytest.raises(OSError):  # it is ours already
            other.bind(("127.0.0.1", port))
        with os.fdopen(os.open(config, os.O_WRONLY | os.O_NONBLOCK), "w") as pipe:
            pipe.write(text)
        assert process.stdout.readline() == f"listening on 127.0.0.1:{port}\n"
        assert server.metric("prefilld_ready") == 1 and connects(port)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_help_names_every_default():
    text = subprocess.run([str(harness.PREFILLD), "--help"], capture_output=True, text=True,
                          check=True).stdout
    options = dict(re.findall(r"^  (?:-h,)?--(\w+)(.*)$", text, re.M))
    assert {name for name, what in options.items() if "=" not in what} == {
        "help", "version", "config", "insecure_listen"}
    for option in ("--kv_memory SIZE=half of the machine's, at most 8GiB\n",
                   "--attend_memory SIZE=a quarter of the machine's, at most 4GiB\n",
                   "--max_prompt_tokens TOKENS:INT in [1 - 1048576]=131072\n",
                   "--cache_dir PATH:DIR=none ", "--stall_timeout DURATION=30s\n"):
        assert "  " + option in text, option
    assert "inject" not in text


# --- model directories ----------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return checkpoints.Checkpoint.create(tmp_path / "model", num_hidden_layers=1)


def refuses(model, *words):
    start_fails(f"--model=m={model.directory}", words=words)


@pytest.mark.parametrize("changes,words", [
    ({"model_type": "mamba"}, ["mamba"]),
    ({"model_type": "qwen3_moe"}, ["qwen3_moe"]),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, ["longrope"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "long_factor": [1]}}, ["long_factor"]),
    ({"model_type": "qwen3"}, ["q_norm"]),
    ({"model_type": "qwen2"}, ["q_proj.bias"]),
    ({"model_type": "qwen2", "use_sliding_window": True}, ["use_sliding_window"]),
    ({"model_type": "glm"}, ["gate_up_proj"]),
    ({"rope_scaling": {"rope_type": "banana", "factor": 4.0}}, ["banana"]),
    ({"sliding_window": 128}, ["sliding_window"]),
    ({"num_local_experts": 8}, ["num_local_experts"]),
    ({"hidden_act": "gelu"}, ["gelu"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ({"num_attention_heads": 3}, ["num_attention_heads"]),
    ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
    ({"num_attention_heads": 0}, ["num_attention_heads"]),
    ({"num_hidden_layers": -1}, ["num_hidden_layers"]),
    ({"num_hidden_layers": 2}, ["model.layers.1."]),
    ({"hidden_size": 2**40}, ["hidden_size"]),
    ({"hidden_size": "big"}, ["hidden_size"]),
    ({"hidden_size": 128}, ["128"]),
    ({"vocab_size": 321}, ["embed_tokens"]),
    ({"rms_norm_eps": "tiny"}, ["rms_norm_eps"]),
    ({"rms_norm_eps": -1}, ["rms_norm_eps"]),
    ({"rope_theta": 0}, ["rope_theta"]),
    ({"tie_word_embeddings": False}, ["lm_head.weight"]),
    ({"attention_bias": True}, ["bias"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
], ids=str)
def test_a_config_that_would_change_the_mathematics_is_refused_by_name(model, changes, words):
    checkpoints.write_config(model.directory, model.config | changes)
    refuses(model, *words)


def test_a_head_dim_without_a_kernel_is_refused(tmp_path):
    refuses(checkpoints.Checkpoint.create(tmp_path / "model", head_dim=80), "head_dim", "80")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": 3}', "\x00\xff"])
def test_a_broken_config_file(model, text):
    (model.directory / "config.json").write_text(text)
    refuses(model, "config.json")


def test_missing_files(model):
    (model.directory / "model.safetensors").unlink()
    refuses(model, "safetensors")
    (model.directory / "config.json").unlink()
    refuses(model, "config.json")


def rewrite(model, change):
    weights = dict(model.weights)
    change(weights)
    safetensors_file.save(model.directory / "model.safetensors", weights)


Q = "model.layers.0.self_attn.q_proj.weight"


def test_missing_tensor(model):
    rewrite(model, lambda w: w.pop(Q))
    refuses(model, Q)


def test_wrong_shape(model):
    rewrite(model, lambda w: w.__setitem__(Q, w[Q][:-1]))
    refuses(model, Q)


def test_wrong_dtype(model):
    rewrite(model, lambda w: w.__setitem__(Q, w[Q].astype("int32")))
    refuses(model, Q)


def test_an_unknown_tensor_is_not_ignored(model):
    rewrite(model, lambda w: w.__setitem__("model.layers.0.self_attn.q_norm.weight", w[Q][0]))
    refuses(model, "q_norm")


HEADER_DAMAGE = {
    "empty file": lambda raw: b"",
    "seven bytes": lambda raw: raw[:7],
    "header longer than the file": lambda raw: struct.pack("<Q", len(raw)) + raw[8:],
    "header of 2^63": lambda raw: struct.pack("<Q", 2**63) + raw[8:],
    "header of 2^64-8": lambda raw: struct.pack("<Q", 2**64 - 8) + raw[8:],
    "header of zero": lambda raw: struct.pack("<Q", 0) + raw[8:],
    "header cut": lambda raw: raw[:40],
    "data cut": lambda raw: raw[:-1],
    "half the data": lambda raw: raw[:len(raw) // 2],
    "no JSON": lambda raw: raw[:8] + b"!" + raw[9:],
}


@pytest.mark.parametrize("case", HEADER_DAMAGE)
def test_a_damaged_file(model, case):
    path = model.directory / "model.safetensors"
    path.write_bytes(HEADER_DAMAGE[case](path.read_bytes()))
    refuses(model, "model.safetensors")


def entry_damage(entry):
    return {
        "offsets backwards": {"data_offsets": entry["data_offsets"][::-1]},
        "offsets past the end": {"data_offsets": [0, 2**60]},
        "offsets negative": {"data_offsets": [-8, entry["data_offsets"][1]]},
        "offset missing": {"data_offsets": [0]},
        "offsets too short for the shape": {"data_offsets": [0, 4]},
        "shape overflows": {"shape": [2**32, 2**32]},
        "negative shape": {"shape": [-256, -256]},
        "shape is text": {"shape": "wide"},
        "unknown dtype": {"dtype": "Q4_1"},
        "dtype is a number": {"dtype": 3},
    }


@pytest.mark.parametrize("case", entry_damage({"data_offsets": [0, 0]}))
def test_a_damaged_entry(model, case):
    path = model.directory / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + length])
    header[Q] |= entry_damage(header[Q])[case]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length:])
    refuses(model, "model.safetensors")


def shard(model, index):
    """The model as two shards with this index file (a function of its weight map)."""
    names = sorted(model.weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        safetensors_file.save(model.directory / file, {n: model.weights[n] for n in members})
    (model.directory / "model.safetensors").unlink()
    weight_map = {n: file for file, members in parts.items() for n in members}
    (model.directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index(weight_map)}))


def test_shards_are_read(model, start_server):
    shard(model, lambda m: m)
    with start_server("--kv_memory=16MiB", models=[("m", model.directory)]):
        pass


@pytest.mark.parametrize("index,word", [
    (lambda m: {k: v for k, v in m.items() if k != Q}, "q_proj"),
    (lambda m: m | {Q: "c.safetensors"}, "q_proj"),
    (lambda m: m | {"x": "c.safetensors"}, "c.safetensors"),
    (lambda m: m | {Q: "../a.safetensors"}, "../a.safetensors"),
    (lambda m: m | {Q: "/etc/passwd"}, "/etc/passwd"),
    (lambda m: m | {Q: (set(m.values()) - {m[Q]}).pop()}, "q_proj"),
    (lambda m: "nothing", "index"),
], ids=["tensor missing", "in another file", "file missing", "outside", "absolute",
        "in the other file", "no map"])
def test_a_broken_index_of_shards(model, index, word):
    shard(model, index)
    refuses(model, word)


# --- what a good start looks like -----------------------------------------------------------------


def test_the_announced_ports_answer(start_server):
    with start_server() as server:
        assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d+", server.target)
        assert server.get("/metrics")[0] == 200
        harness.prefillctl(server, "health")


def test_a_configuration_file_sets_flags(tmp_path, tiny):
    config = tmp_path / "prefilld.toml"
    config.write_text(f'listen="127.0.0.1:0"\nhttp="127.0.0.1:0"\nbackend="cpu"\n'
                      f'kv_memory="16MiB"\nmodel=["tiny={tiny.directory}"]\n')
    process = subprocess.Popen([str(harness.PREFILLD), f"--config={config}"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout.readline().startswith("listening on 127.0.0.1:")
        assert process.stdout.readline().startswith("http on 127.0.0.1:")
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_nothing_but_loopback_is_listened_on(shared_server):
    """Every listening TCP socket of the process is bound to 127.0.0.1."""
    inodes = set()
    for fd in os.listdir(f"/proc/{shared_server.process.pid}/fd"):
        try:
            link = os.readlink(f"/proc/{shared_server.process.pid}/fd/{fd}")
        except FileNotFoundError:
            continue
        inodes |= set(re.findall(r"socket:\[(\d+)\]", link))
    listening = []
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/{shared_server.process.pid}/net/{table}").readlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}  # as IPv4, and mapped into IPv6
    assert listening and set(listening) <= loopback
