#include "client/cli/load.h"

#include <bit>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace prefilld::cli {
namespace {

class PrefillLoad : public Load {
 public:
  PrefillLoad(const v1::Model& model, uint32_t tokens, v1::Transport transport,
              v1::SparsityPolicy policy)
      : model_(model.name()),
        vocab_size_(model.vocab_size()),
        tokens_(tokens),
        transport_(transport),
        policy_(std::move(policy)) {}

  absl::StatusOr<Sample> Send(client::PrefillClient& client, std::mt19937& rng,
                              const client::CallOptions& options) override {
    v1::PrefillRequest request;
    request.set_model(model_);
    *request.mutable_sparsity() = policy_;
    request.mutable_destination()->set_transport(transport_);
    std::uniform_int_distribution<uint32_t> token(0, vocab_size_ - 1);
    for (uint32_t i = 0; i < tokens_; ++i) request.add_token_ids(token(rng));

    v1::Lease lease;
    // Whatever happens, the next request must not find the memory taken.
    const absl::Cleanup release = [&] {
      if (lease.name().empty()) return;
      (void)client.ReleaseLease(lease, v1::RELEASE_REASON_ABANDONED,
                                {.timeout = absl::Seconds(2), .retry = {.tries_max = 1}});
    };
    Sample sample;
    const absl::Time start = client::SteadyNow();
    const auto summary = client.Prefill(
        std::move(request),
        [&](const v1::PrefillEvent& event) {
          if (event.has_admission()) lease = event.admission().lease();
          if (event.has_kv_ready()) {
            sample.ttft_seconds = absl::ToDoubleSeconds(client::SteadyNow() - start);
          }
          return absl::OkStatus();
        },
        options);
    if (!summary.ok()) return summary.status();
    sample.density = summary->sparsity().mean_density();
    return sample;
  }

 private:
  const std::string model_;
  const uint32_t vocab_size_, tokens_;
  const v1::Transport transport_;
  const v1::SparsityPolicy policy_;
};

class AttendLoad : public Load {
 public:
  AttendLoad(const AttendLoadShape& shape, uint32_t tokens, const v1::SparsityPolicy& policy) {
    *header_.mutable_sparsity() = policy;
    std::mt19937 rng(1);
    inputs_ = {RandomTensor("q", tokens, shape.q_heads, shape.head_dim, rng),
               RandomTensor("k", tokens, shape.kv_heads, shape.head_dim, rng),
               RandomTensor("v", tokens, shape.kv_heads, shape.head_dim, rng)};
  }

  absl::StatusOr<Sample> Send(client::PrefillClient& client, std::mt19937& /*rng*/,
                              const client::CallOptions& options) override {
    Sample sample;
    const absl::Time start = client::SteadyNow();
    std::vector<std::vector<uint8_t>> outputs;
    client::AttendCall call;
    call.header = header_;
    call.inputs = inputs_;
    call.allocate =
        [&](const std::vector<v1::TensorSpec>& specs) -> absl::StatusOr<std::vector<void*>> {
      sample.ttft_seconds = absl::ToDoubleSeconds(client::SteadyNow() - start);
      std::vector<void*> places;
      for (const v1::TensorSpec& spec : specs) {
        const auto bytes = client::TensorBytes(spec);
        if (!bytes.ok()) return bytes.status();
        // The only output asked for is o, which is as large as q.
        if (*bytes > *client::TensorBytes(inputs_[0].spec)) {
          return absl::DataLossError(absl::StrCat("unexpected output ", client::Describe(spec)));
        }
        places.push_back(outputs.emplace_back(*bytes).data());
      }
      return places;
    };
    const auto summary = client.Attend(call, options);
    if (!summary.ok()) return summary.status();
    sample.density = summary->sparsity().mean_density();
    return sample;
  }

 private:
  static client::InputTensor RandomTensor(const char* name, uint32_t tokens, uint32_t heads,
                                          uint32_t head_dim, std::mt19937& rng) {
    auto values = std::make_shared<std::vector<uint16_t>>(size_t{tokens} * heads * head_dim);
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (uint16_t& value : *values) {
      value =
          static_cast<uint16_t>(std::bit_cast<uint32_t>(uniform(rng)) >> 16);  // BF16, truncated
    }
    client::InputTensor tensor;
    tensor.spec.set_name(name);
    tensor.spec.set_data_type(v1::DATA_TYPE_BF16);
    for (uint32_t dimension : {tokens, heads, head_dim}) tensor.spec.add_shape(dimension);
    tensor.data = values->data();
    tensor.owner = std::move(values);
    return tensor;
  }

  v1::AttendHeader header_;
  std::vector<client::InputTensor> inputs_;
};

}  // namespace

absl::StatusOr<AttendLoadShape> ParseShape(const std::string& text) {
  AttendLoadShape shape;
  const std::vector<std::string> parts = absl::StrSplit(text, '/');
  uint32_t* const fields[] = {&shape.q_heads, &shape.kv_heads, &shape.head_dim};
  bool ok = parts.size() == std::size(fields);
  for (size_t i = 0; ok && i < parts.size(); ++i) {
    ok = absl::SimpleAtoi(parts[i], fields[i]) && *fields[i] >= 1 && *fields[i] <= 4096;
  }
  if (!ok) {
    return absl::InvalidArgumentError(
        absl::StrCat("shape ", text, " is not Q_HEADS/KV_HEADS/HEAD_DIM, each from 1 to 4096"));
  }
  return shape;
}

std::unique_ptr<Load> MakePrefillLoad(const v1::Model& model, uint32_t tokens,
                                      v1::Transport transport, const v1::SparsityPolicy& policy) {
  return std::make_unique<PrefillLoad>(model, tokens, transport, policy);
}

std::unique_ptr<Load> MakeAttendLoad(const AttendLoadShape& shape, uint32_t tokens,
                                     const v1::SparsityPolicy& policy) {
  return std::make_unique<AttendLoad>(shape, tokens, policy);
}

}  // namespace prefilld::cli
