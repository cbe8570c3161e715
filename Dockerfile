# prefilld in two small images that run as nobody, built beside their compilers.
#   docker build -t prefilld .                       # for CPUs
#   docker build -t prefilld-cuda --target=cuda .    # and for GPUs: docker run --gpus=1 ...
# It listens on the container's own loopback until it is told where, and how (docs/access.md):
#   docker run -p 50051:50051 -p 9464:9464 -v /path/to/model:/models/m:ro -v /path/to/tls:/tls:ro prefilld \
#     --model=m=/models/m --listen=0.0.0.0:50051 --http=0.0.0.0:9464 --tls_cert=/tls/tls.crt --tls_key=/tls/tls.key
# or, in the clear, --insecure_listen in place of the last two.
# Containers that map its memory share the directory of --memory_socket: docs/shared-memory.md.
FROM debian:12-slim AS packages
COPY deploy/packages.txt /tmp/
RUN apt-get update \
    && grep -v '^#' /tmp/packages.txt | xargs apt-get install -y --no-install-recommends \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .

FROM packages AS cpu-build
RUN cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DPREFILLD_BUILD_TESTS=OFF \
      -DPREFILLD_CUDA=off \
    && cmake --build build --target prefilld prefillctl \
    && strip build/prefilld build/prefillctl

FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu22.04 AS toolkit

FROM packages AS cuda-build
COPY --from=toolkit /usr/local/cuda /usr/local/cuda
COPY --from=toolkit /usr/include/cudnn*.h /usr/local/cuda/include/
RUN cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DPREFILLD_BUILD_TESTS=OFF \
      -DPREFILLD_CUDA=on \
    && cmake --build build --target prefilld prefillctl \
    && strip build/prefilld build/prefillctl

FROM debian:12-slim AS runtime
RUN apt-get update && apt-get install -y --no-install-recommends \
      libgrpc++1.51 libprotobuf32 libabsl20220623 libprometheus-cpp-core1.0 \
      libhwy1 libdnnl2 libisal2 libssl3 libgomp1 \
    && rm -rf /var/lib/apt/lists/*
USER 65534:65534
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
ENTRYPOINT ["prefilld"]

# The driver comes from the host; cuDNN and what it loads, and cuBLASLt, from the toolkit.
FROM runtime AS cuda
USER root
COPY --from=toolkit /usr/lib/x86_64-linux-gnu/libcudnn*.so.9* /usr/local/lib/
COPY --from=toolkit /usr/local/cuda/lib64/libcudart.so.13* /usr/local/cuda/lib64/libnvrtc*.so.13* \
     /usr/local/cuda/lib64/libcublasLt.so.13* \
     /usr/local/lib/
RUN ldconfig
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-build /src/build/prefilld /src/build/prefillctl /usr/local/bin/
USER 65534:65534

FROM runtime AS cpu
COPY --from=cpu-build /src/build/prefilld /src/build/prefillctl /usr/local/bin/
