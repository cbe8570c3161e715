# prefilld for CPUs. Two stages: a build with compilers, and a small image that runs as nobody.
#   docker build -t prefilld .
#   docker run -p 50051:50051 -p 9464:9464 -v /path/to/model:/models/m:ro prefilld --model=m=/models/m
FROM debian:12-slim AS build
COPY deploy/packages.txt /tmp/
RUN apt-get update \
    && grep -v '^#' /tmp/packages.txt | xargs apt-get install -y --no-install-recommends \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DPREFILLD_BUILD_TESTS=OFF \
    && cmake --build build --target prefilld prefillctl \
    && strip build/prefilld build/prefillctl

FROM debian:12-slim
RUN apt-get update && apt-get install -y --no-install-recommends \
      libgrpc++1.51 libprotobuf32 libabsl20220623 libprometheus-cpp-core1.0 libcivetweb1 \
      libhwy1 libdnnl2 libisal2 libssl3 libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/build/prefilld /src/build/prefillctl /usr/local/bin/
USER 65534:65534
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
ENTRYPOINT ["prefilld", "--listen=0.0.0.0:50051", "--http=0.0.0.0:9464", "--insecure_listen"]
