// prefillctl attend: attention over the tensors of a safetensors file.
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"
#include "client/cli/command.h"
#include "client/cli/policy.h"
#include "client/cli/progress.h"
#include "client/cli/report.h"
#include "client/cpp/safetensors.h"

namespace prefilld::cli {
namespace {

struct AttendFlags {
  std::string in, out, request_id;
  PolicyFlags policy;
  std::optional<float> softmax_scale;
  bool return_index = false;
};

// The offsets of an optional tensor "cu_seqlens_..."; leaves `offsets` empty without it.
absl::Status ReadOffsets(const client::SafetensorsFile& file, const std::string& name,
                         google::protobuf::RepeatedField<uint32_t>& offsets) {
  const client::InputTensor* tensor = file.Find(name);
  if (tensor == nullptr) return absl::OkStatus();
  if (tensor->spec.data_type() != v1::DATA_TYPE_I32 || tensor->spec.shape_size() != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected [sequences + 1] I32, got ", client::Describe(tensor->spec)));
  }
  for (int64_t i = 0; i < tensor->spec.shape(0); ++i) {
    int32_t offset;
    std::memcpy(&offset, static_cast<const char*>(tensor->data) + i * sizeof(offset),
                sizeof(offset));
    if (offset < 0) {
      return absl::InvalidArgumentError(absl::StrCat(name, "[", i, "] is ", offset, ", below 0"));
    }
    offsets.Add(static_cast<uint32_t>(offset));
  }
  return absl::OkStatus();
}

absl::StatusOr<client::AttendCall> ReadCall(const AttendFlags& flags) {
  client::AttendCall call;
  const auto policy = ToPolicy(flags.policy);
  if (!policy.ok()) return policy.status();
  *call.header.mutable_sparsity() = *policy;
  call.header.set_request_id(flags.request_id);
  call.header.set_return_lse(true);
  call.header.set_return_block_index(flags.return_index);
  if (flags.softmax_scale) call.header.set_softmax_scale(*flags.softmax_scale);

  const auto file = client::SafetensorsFile::Open(flags.in);
  if (!file.ok()) return file.status();
  for (const char* name : {"q", "k", "v"}) {
    auto tensor = file->Get(name);
    if (!tensor.ok()) return tensor.status();
    call.inputs.push_back(*std::move(tensor));
  }
  absl::Status status = ReadOffsets(*file, "cu_seqlens_q", *call.header.mutable_cu_seqlens_q());
  status.Update(ReadOffsets(*file, "cu_seqlens_k", *call.header.mutable_cu_seqlens_k()));
  if (!status.ok()) return status;
  return call;
}

absl::Status RunAttend(client::PrefillClient& client, const Session& session,
                       const AttendFlags& flags) {
  const absl::Time start = client::SteadyNow();
  std::error_code neither_is_there;
  if (std::filesystem::equivalent(flags.in, flags.out, neither_is_there)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--out=", flags.out, " is --in: the output would take its place"));
  }
  auto call = ReadCall(flags);
  if (!call.ok()) return call.status();
  const auto writer = client::SafetensorsWriter::Create(flags.out);
  if (!writer.ok()) return writer.status();
  call->allocate = [&](const std::vector<v1::TensorSpec>& specs) {
    return (*writer)->Allocate(specs);
  };

  absl::StatusOr<v1::Summary> summary;
  {
    Progress progress(session.io.err, session.io.err_is_terminal);
    call->on_upload = [&](uint64_t sent, uint64_t total) {
      progress.Update("uploading", static_cast<double>(sent), static_cast<double>(total));
    };
    call->on_download = [&](uint64_t received, uint64_t total) {
      progress.Update("downloading", static_cast<double>(received), static_cast<double>(total));
    };
    summary = client.Attend(*call, session.Options());
  }
  if (!summary.ok()) return summary.status();
  if (const absl::Status status = (*writer)->Commit(); !status.ok()) return status;
  PrintReport({.summary = *summary,
               .transport = "grpc",
               .total_seconds = absl::ToDoubleSeconds(client::SteadyNow() - start)},
              session.json, session.io.out);
  return absl::OkStatus();
}

}  // namespace

void AddAttend(CLI::App& app, Session& session) {
  CLI::App* command = app.add_subcommand("attend", "Attention over tensors of a safetensors file");
  command->footer(
      "Example: prefillctl attend --in=qkv.safetensors --out=o.safetensors --method=joint");
  const auto flags = std::make_shared<AttendFlags>();
  command
      ->add_option("--in", flags->in,
                   "Safetensors: q [Sq, Hq, d], k and v [Sk, Hkv, d] (F32, BF16 or F16); of "
                   "several sequences also cu_seqlens_q, cu_seqlens_k [sequences + 1] I32")
      ->type_name("FILE")
      ->required();
  command
      ->add_option("--out", flags->out,
                   "Safetensors, written: o as q, lse [Hq, Sq] F32; with --return_index "
                   "also block_count, block_index, pattern, captured_mass")
      ->type_name("FILE")
      ->required();
  command->add_flag("--return_index", flags->return_index, "Also write which blocks were computed");
  command->add_option("--softmax_scale", flags->softmax_scale, "Factor of q.k [1/sqrt(d)]");
  AddRequestId(*command, flags->request_id);
  AddPolicyFlags(*command, flags->policy);
  command->callback([&session, flags] {
    session.action = [&session, flags](client::PrefillClient& client) {
      return RunAttend(client, session, *flags);
    };
  });
}

}  // namespace prefilld::cli
