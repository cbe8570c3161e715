// How fast a KV cache leaves, against what gRPC can do at all:
//
//   handoff --target=HOST:PORT --model=NAME --tokens=ids.json [--rounds=9] [--json]
//
// Prefills the text on a running prefilld, then pulls its cache as a decode process would (every
// chunk checked and copied to its place), in turn with a bare stream: a generic service in another
// process that sends messages of the same sizes from memory, whose receiver only copies them.
// Prints the medians and their ratio; exits 1 when PullKv reaches less than kShareOfBare of the
// bare stream.
#include <grpcpp/create_channel.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/support/sync_stream.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/cpp/client.h"
#include "client/cpp/errors.h"
#include "proto/wire/chunk.h"
#include "tests/bench/service/bare_stream.h"

namespace prefilld {
namespace {

constexpr double kShareOfBare = 0.8;

struct Options {
  std::string target, model, tokens;
  int rounds = 9;
  bool json = false;
};

// A server-streaming call whose messages stay bytes.
absl::Status ReadRaw(grpc::ChannelInterface* channel, const char* method_name,
                     const grpc::ByteBuffer& request,
                     const std::function<void(const grpc::ByteBuffer&)>& on_message) {
  const grpc::internal::RpcMethod method(method_name, grpc::internal::RpcMethod::SERVER_STREAMING);
  grpc::ClientContext context;
  const std::unique_ptr<grpc::ClientReader<grpc::ByteBuffer>> stream(
      grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(channel, method, &context,
                                                                    request));
  grpc::ByteBuffer message;
  while (stream->Read(&message)) on_message(message);
  return client::FromGrpc(stream->Finish());
}

// A leased cache on the server, and memory for all of it.
struct Cache {
  v1::Lease lease;
  uint64_t tensor_bytes = 0;  // of one layer's K
  std::vector<uint8_t> memory;
};

absl::StatusOr<Cache> Prefill(client::PrefillClient& client, const Options& options) {
  const auto text = nlohmann::json::parse(std::ifstream(options.tokens), nullptr, false);
  if (!text.is_array() || text.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(options.tokens, " is no array of token IDs"));
  }
  v1::PrefillRequest request;
  request.set_model(options.model);
  for (const uint32_t id : text.get<std::vector<uint32_t>>()) request.add_token_ids(id);
  Cache cache;
  const auto summary = client.Prefill(request, [&](const v1::PrefillEvent& event) {
    if (event.has_kv_ready()) cache.lease = event.kv_ready();
    return absl::OkStatus();
  });
  if (!summary.ok()) return summary.status();
  const auto model = client.GetModel(options.model);
  if (!model.ok()) return model.status();
  const uint64_t bytes = model->kv_bytes_per_token() * text.size();
  cache.tensor_bytes = bytes / (2 * model->layers());
  cache.memory.assign(bytes, 1);  // touched: the first pull must not pay for the pages
  return cache;
}

// The sizes of the messages in which the server sends the cache.
absl::StatusOr<std::vector<uint32_t>> MessageSizes(const Options& options, const Cache& cache) {
  const auto channel = grpc::CreateChannel(options.target, grpc::InsecureChannelCredentials());
  v1::PullKvRequest request;
  request.set_lease(cache.lease.name());
  request.set_generation(cache.lease.generation());
  std::vector<uint32_t> sizes;
  const absl::Status status = ReadRaw(channel.get(), "/prefilld.v1.KvHandoffService/PullKv",
                                      EncodeMessage(request), [&](const grpc::ByteBuffer& message) {
                                        sizes.push_back(static_cast<uint32_t>(message.Length()));
                                      });
  if (!status.ok()) return status;
  return sizes;
}

absl::Status PullKv(client::PrefillClient& client, Cache& cache) {
  client::PullCall call;
  call.lease = cache.lease;
  call.tensor_bytes = cache.tensor_bytes;
  call.destination = [&](uint32_t layer, int tensor) -> absl::StatusOr<void*> {
    return cache.memory.data() + (2 * layer + tensor) * cache.tensor_bytes;
  };
  return client.PullKv(call);
}

absl::Status PullBare(grpc::ChannelInterface* channel, const std::vector<uint32_t>& sizes,
                      Cache& cache) {
  const grpc::Slice request(sizes.data(), sizes.size() * sizeof(uint32_t));
  uint64_t received = 0;
  std::vector<grpc::Slice> slices;
  const absl::Status status = ReadRaw(
      channel, kBareMethod, grpc::ByteBuffer(&request, 1), [&](const grpc::ByteBuffer& message) {
        if (!message.Dump(&slices).ok()) return;
        for (const grpc::Slice& slice : slices) {
          const size_t room = cache.memory.size() - received;
          const size_t bytes = std::min(slice.size(), room);  // the rest is chunk headers
          std::copy_n(slice.begin(), bytes, cache.memory.data() + received);
          received += bytes;
        }
      });
  if (status.ok() && received != cache.memory.size()) {
    return absl::DataLossError(absl::StrCat("the bare stream sent ", received, " bytes"));
  }
  return status;
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

// Adds the call's rate in GB/s.
absl::Status Time(uint64_t bytes, std::vector<double>& rates,
                  const std::function<absl::Status()>& call) {
  const absl::Time begin = absl::Now();
  const absl::Status status = call();
  rates.push_back(static_cast<double>(bytes) * 1e-9 / absl::ToDoubleSeconds(absl::Now() - begin));
  return status;
}

absl::Status Measure(const Options& options, bool* holds) {
  client::PrefillClient client(options.target);
  auto cache = Prefill(client, options);
  if (!cache.ok()) return cache.status();
  const auto sizes = MessageSizes(options, *cache);
  if (!sizes.ok()) return sizes.status();
  const auto bare_server = BareServer::Start();
  if (!bare_server.ok()) return bare_server.status();
  const auto bare_channel =
      grpc::CreateChannel((*bare_server)->target(), grpc::InsecureChannelCredentials());

  std::vector<double> bare, pull;
  absl::Status status = PullBare(bare_channel.get(), *sizes, *cache);  // warms up, as PullKv is
  for (int round = 0; round < options.rounds && status.ok(); ++round) {
    status = Time(cache->memory.size(), bare,
                  [&] { return PullBare(bare_channel.get(), *sizes, *cache); });
    if (!status.ok()) break;
    status = Time(cache->memory.size(), pull, [&] { return PullKv(client, *cache); });
  }
  if (!status.ok()) return status;
  const auto released = client.ReleaseLease(cache->lease, v1::RELEASE_REASON_CONSUMED);
  if (!released.ok()) return released.status();

  const double ratio = Median(pull) / Median(bare);
  *holds = ratio >= kShareOfBare;
  const double megabytes = static_cast<double>(cache->memory.size()) * 1e-6;
  if (options.json) {
    const nlohmann::json out{{"megabytes", megabytes},
                             {"messages", sizes->size()},
                             {"bare_gb_per_s", Median(bare)},
                             {"pull_kv_gb_per_s", Median(pull)},
                             {"ratio", ratio},
                             {"limit", kShareOfBare},
                             {"ok", *holds}};
    absl::PrintF("%s\n", out.dump());
    return absl::OkStatus();
  }
  absl::PrintF("%.0f MB in %d messages, medians of %d\n", megabytes, sizes->size(), options.rounds);
  absl::PrintF("bare stream  %6.2f GB/s\nPullKv       %6.2f GB/s\n", Median(bare), Median(pull));
  absl::PrintF("%s  PullKv / bare stream %.3f (at least %.3f)\n", *holds ? "ok    " : "MISSED",
               ratio, kShareOfBare);
  return absl::OkStatus();
}

}  // namespace
}  // namespace prefilld

int main(int argc, char** argv) {
  if (argc == 2 && argv[1] == std::string(prefilld::kBareServerFlag)) {
    return prefilld::ServeBareStream();
  }
  prefilld::Options options;
  CLI::App app("PullKv against a bare gRPC stream");
  app.add_option("--target", options.target, "a running prefilld")->required();
  app.add_option("--model", options.model, "one of its models")->required();
  app.add_option("--tokens", options.tokens, "JSON array of token IDs")->required();
  app.add_option("--rounds", options.rounds, "of each stream")->check(CLI::Range(1, 1000));
  app.add_flag("--json", options.json, "one JSON object instead of the table");
  CLI11_PARSE(app, argc, argv);
  bool holds = false;
  const absl::Status status = prefilld::Measure(options, &holds);
  if (!status.ok()) absl::FPrintF(stderr, "handoff: %s\n", status.ToString());
  return status.ok() && holds ? 0 : 1;
}
