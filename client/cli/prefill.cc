// prefillctl prefill: a prompt through a model; its KV cache pulled into a safetensors file while
// it is computed.
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cli/command.h"
#include "client/cli/policy.h"
#include "client/cli/progress.h"
#include "client/cli/report.h"
#include "client/cli/token_ids.h"
#include "client/cpp/safetensors.h"

namespace prefilld::cli {
namespace {

using client::SafetensorsWriter;

struct PrefillFlags {
  std::string model, tokens, kv_out, logits_out, request_id;
  PolicyFlags policy;
};

// One prefill with its pull, which runs on a thread of its own from admission on. The lease is
// given back when this is destroyed.
class PrefillRun {
 public:
  PrefillRun(client::PrefillClient& client, const Session& session, const PrefillFlags& flags)
      : client_(client),
        session_(session),
        flags_(flags),
        progress_(session.io.err, session.io.err_is_terminal) {}

  ~PrefillRun() {
    if (pull_.joinable()) pull_.join();
    if (lease_.name().empty()) return;
    // Not with the session's options: after a cancellation the lease still has to go, and a server
    // that does not answer lets it expire.
    (void)client_.ReleaseLease(
        lease_, consumed_ ? v1::RELEASE_REASON_CONSUMED : v1::RELEASE_REASON_ABANDONED,
        {.timeout = absl::Seconds(2), .retry = {.tries_max = 1}});
  }

  absl::StatusOr<RequestReport> Run() {
    absl::Status status = Prepare();
    if (!status.ok()) return status;
    auto summary = client_.Prefill(
        request_, [this](const v1::PrefillEvent& event) { return OnEvent(event); },
        session_.Options());
    // The command has failed: its pull shall not wait for layers that may never come.
    if (!summary.ok()) session_.io.cancellation.Cancel();
    if (pull_.joinable()) pull_.join();
    if (!summary.ok()) return summary.status();
    if (!pull_status_.ok()) return pull_status_;
    consumed_ = kv_ != nullptr;
    if (kv_ != nullptr) status.Update(kv_->Commit());
    if (logits_ != nullptr) {
      status.Update(has_logits_ ? logits_->Commit() : absl::DataLossError("no logits came"));
    }
    if (!status.ok()) return status;
    report_.summary = *std::move(summary);
    report_.total_seconds = Elapsed();
    return report_;
  }

 private:
  double Elapsed() const { return absl::ToDoubleSeconds(client::SteadyNow() - start_); }

  // Everything that can fail before the server starts to work.
  absl::Status Prepare() {
    const auto policy = ToPolicy(flags_.policy);
    if (!policy.ok()) return policy.status();
    auto ids = ReadTokenIds(flags_.tokens);
    if (!ids.ok()) return ids.status();
    request_.set_request_id(flags_.request_id);
    request_.set_model(flags_.model);
    request_.mutable_token_ids()->Add(ids->begin(), ids->end());
    *request_.mutable_sparsity() = *policy;
    request_.set_return_logits(!flags_.logits_out.empty());

    auto model = client_.GetModel(flags_.model, session_.Options());
    if (!model.ok()) return model.status();
    model_ = *std::move(model);
    v1::NegotiateRequest negotiate;
    negotiate.set_model(flags_.model);
    negotiate.set_fingerprint(model_.fingerprint());
    negotiate.add_transports(v1::TRANSPORT_GRPC);
    const auto negotiated = client_.Negotiate(negotiate, session_.Options());
    if (!negotiated.ok()) return negotiated.status();
    report_.transport = "grpc";  // the only one asked for, so the one agreed on

    for (const auto& [path, writer] :
         {std::pair{&flags_.kv_out, &kv_}, std::pair{&flags_.logits_out, &logits_}}) {
      if (path->empty()) continue;
      auto created = SafetensorsWriter::Create(*path);
      if (!created.ok()) return created.status();
      *writer = *std::move(created);
    }
    return absl::OkStatus();
  }

  absl::Status OnEvent(const v1::PrefillEvent& event) {
    switch (event.event_case()) {
      case v1::PrefillEvent::kAdmission:
        lease_ = event.admission().lease();
        // Events start over when a broken stream is attached again; the pull goes on by itself.
        return kv_ == nullptr || pull_.joinable() ? absl::OkStatus() : StartPull();
      case v1::PrefillEvent::kLayerReady:
        progress_.Update("prefilling", event.layer_ready().layer() + 1.0, model_.layers());
        return absl::OkStatus();
      case v1::PrefillEvent::kKvReady:
        if (!report_.ttft_seconds) report_.ttft_seconds = Elapsed();
        return absl::OkStatus();
      case v1::PrefillEvent::kLogits:
        return logits_ == nullptr ? absl::OkStatus() : WriteLogits(event.logits());
      default:
        return absl::OkStatus();
    }
  }

  absl::Status StartPull() {
    if (lease_.layers() != model_.layers() ||
        lease_.tokens() != static_cast<uint64_t>(request_.token_ids_size())) {
      return absl::DataLossError(absl::StrCat(
          "lease of ", lease_.layers(), " layers and ", lease_.tokens(), " tokens for a prompt of ",
          request_.token_ids_size(), " tokens and a model of ", model_.layers(), " layers"));
    }
    std::vector<v1::TensorSpec> specs;
    for (uint32_t layer = 0; layer < lease_.layers(); ++layer) {
      for (const char* name : {"k", "v"}) {
        v1::TensorSpec& spec = specs.emplace_back();
        spec.set_name(absl::StrCat("layers.", layer, ".", name));
        spec.set_data_type(model_.data_type());
        spec.add_shape(model_.kv_heads());
        spec.add_shape(static_cast<int64_t>(lease_.tokens()));
        spec.add_shape(model_.head_dim());
      }
    }
    const auto tensor_bytes = client::TensorBytes(specs.front());
    if (!tensor_bytes.ok()) return tensor_bytes.status();
    auto places = kv_->Allocate(specs);
    if (!places.ok()) return places.status();

    client::PullCall call;
    call.lease = lease_;
    call.tensor_bytes = *tensor_bytes;
    call.destination = [places = *std::move(places)](uint32_t layer, int tensor_index) {
      return places[2 * layer + tensor_index];
    };
    call.on_layer = [this](uint32_t layer) {
      progress_.Update("pulling KV", layer + 1.0, model_.layers());
    };
    pull_ = std::thread([this, call = std::move(call)] {
      pull_status_ = client_.PullKv(call, session_.Options());
    });
    return absl::OkStatus();
  }

  absl::Status WriteLogits(const v1::Logits& logits) {
    v1::TensorSpec spec;
    spec.set_name("logits");
    spec.set_data_type(v1::DATA_TYPE_F32);
    spec.add_shape(logits.vocab_size());
    const auto bytes = client::TensorBytes(spec);
    if (!bytes.ok() || *bytes != logits.f32().size()) {
      return absl::DataLossError(absl::StrCat(logits.f32().size(), " bytes of logits for ",
                                              logits.vocab_size(), " tokens"));
    }
    const auto places = logits_->Allocate({spec});
    if (!places.ok()) return places.status();
    std::memcpy(places->front(), logits.f32().data(), logits.f32().size());
    has_logits_ = true;
    return absl::OkStatus();
  }

  client::PrefillClient& client_;
  const Session& session_;
  const PrefillFlags& flags_;
  const absl::Time start_ = client::SteadyNow();
  Progress progress_;
  v1::PrefillRequest request_;
  v1::Model model_;
  v1::Lease lease_;
  std::unique_ptr<SafetensorsWriter> kv_, logits_;  // null: not asked for
  bool has_logits_ = false;
  bool consumed_ = false;
  RequestReport report_;
  std::thread pull_;
  absl::Status pull_status_;  // by the pull's thread until it is joined
};

absl::Status RunPrefill(client::PrefillClient& client, const Session& session,
                        const PrefillFlags& flags) {
  const auto report = PrefillRun(client, session, flags).Run();
  if (!report.ok()) return report.status();
  PrintReport(*report, session.json, session.io.out);
  return absl::OkStatus();
}

}  // namespace

void AddPrefill(CLI::App& app, Session& session) {
  CLI::App* command = app.add_subcommand("prefill", "Runs a prompt through a model");
  command->footer(
      "Example: prefillctl prefill --model=smol --tokens=ids.json --kv_out=kv.safetensors "
      "--request_id=mine");
  const auto flags = std::make_shared<PrefillFlags>();
  command->add_option("--model", flags->model, "Model, as `models` names it")->required();
  command->add_option("--tokens", flags->tokens, "Prompt: a JSON array of token IDs")
      ->type_name("FILE")
      ->required();
  command
      ->add_option("--kv_out", flags->kv_out,
                   "Safetensors, written: layers.{i}.k and .v [kv_heads, tokens, head_dim] in the "
                   "model's dtype [none]")
      ->type_name("FILE");
  command
      ->add_option("--logits_out", flags->logits_out,
                   "Safetensors, written: logits [vocab] F32 of the last token [none]")
      ->type_name("FILE");
  AddRequestId(*command, flags->request_id);
  AddPolicyFlags(*command, flags->policy);
  command->callback([&session, flags] {
    session.action = [&session, flags](client::PrefillClient& client) {
      return RunPrefill(client, session, *flags);
    };
  });
}

}  // namespace prefilld::cli
