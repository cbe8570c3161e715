"""Hundreds of requests from several threads, some cancelled, some abandoned, some wrong."""

import random
import threading

import grpc
import numpy as np

from e2e import attending, harness, prefilling

THREADS = 6
ROUNDS = 40


def test_a_mixed_load_returns_everything(server, tiny):
    expected = {}
    prompts = [tiny.tokens(n, seed=n) for n in (3, 100, 129, 400)]
    for i, ids in enumerate(prompts):
        with prefilling.prefilled(server, ids) as done:
            data = prefilling.pull(server, done.ready)
        expected[i] = prefilling.arrays(data, tiny.config, len(ids))
    arrays = attending.small(tokens=260)
    expected_o = attending.attend(server.prefill, *arrays)[0]["o"]
    errors, done_counts = [], []

    def prefill_and_pull(rng):
        i = rng.randrange(len(prompts))
        call = prefilling.start(server, prompts[i], lease_ttl=30, retain=rng.random() < .5)
        data = prefilling.pull(server, call.admission.lease)
        call.finish()
        prefilling.release(server, call.admission.lease)
        for got, want in zip(prefilling.arrays(data, tiny.config, len(prompts[i])), expected[i]):
            for a, b in zip(got, want):
                assert prefilling.relative_error(a, b) < 1e-5

    def attend(rng):
        outputs, _ = attending.attend(server.prefill, *arrays, chunk_bytes=1 << 15)
        np.testing.assert_allclose(outputs["o"], expected_o, atol=1e-6)

    def cancel_prefill(rng):
        # Where the work was faster than the cancellation, the lease lives until it expires.
        call = prefilling.start(server, prompts[-1], lease_ttl=1)
        if rng.random() < .5:
            next(iter(prefilling.open_pull(server, call.admission.lease)), None)
        call.stream.cancel()

    def cancel_upload(rng):
        call = attending.Call(server.prefill)
        call.admit(attending.header(*arrays))
        for chunk in attending.chunks(arrays, size=1 << 15)[:rng.randrange(8)]:
            call.send(chunk)
        call.cancel()

    def abandon_pull(rng):
        call = prefilling.start(server, prompts[-1], lease_ttl=30)
        stream = prefilling.open_pull(server, call.admission.lease, chunk_bytes=4096)
        next(iter(stream))
        stream.cancel()
        try:
            call.finish()
        finally:
            prefilling.release(server, call.admission.lease, 2)

    def send_nonsense(rng):
        with harness.refused(grpc.StatusCode.INVALID_ARGUMENT):
            prefilling.start(server, [rng.randrange(320, 2**32)])

    def work(seed):
        rng = random.Random(seed)
        actions = [prefill_and_pull] * 3 + [attend] * 3 + [cancel_prefill, cancel_upload,
                                                           abandon_pull, send_nonsense]
        for _ in range(ROUNDS):
            action = rng.choice(actions)
            try:
                action(rng)
                done_counts.append(action.__name__)
            except grpc.RpcError as error:
                failure = harness.Failure(error)
                if failure.retry_after is None:  # a full memory is part of the load
                    errors.append((action.__name__, failure))
            except BaseException as error:  # told by the main thread
                errors.append((action.__name__, error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[:5]
    assert len(done_counts) > THREADS * ROUNDS * .8
    # `server` now checks that everything is back.
