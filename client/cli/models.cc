// prefillctl models: what the server has loaded.
#include "absl/strings/str_format.h"
#include "client/cli/command.h"
#include "client/cli/report.h"

namespace prefilld::cli {
namespace {

using nlohmann::ordered_json;

std::string DtypeName(v1::DataType type) {
  return ShortName(v1::DataType_Name(type), "DATA_TYPE_");
}

ordered_json ToJson(const v1::Model& model) {
  return {{"name", model.name()},
          {"model_type", model.model_type()},
          {"revision", model.revision()},
          {"layers", model.layers()},
          {"q_heads", model.q_heads()},
          {"kv_heads", model.kv_heads()},
          {"head_dim", model.head_dim()},
          {"hidden_size", model.hidden_size()},
          {"vocab_size", model.vocab_size()},
          {"max_prompt_tokens", model.max_prompt_tokens()},
          {"data_type", DtypeName(model.data_type())},
          {"kv_bytes_per_token", model.kv_bytes_per_token()},
          {"fingerprint", model.fingerprint()}};
}

absl::Status RunModels(client::PrefillClient& client, const Session& session) {
  const auto models = client.ListModels(session.Options());
  if (!models.ok()) return models.status();
  if (session.json) {
    ordered_json list = ordered_json::array();
    for (const v1::Model& model : *models) list.push_back(ToJson(model));
    PrintJson({{"models", list}}, session.io.out);
    return absl::OkStatus();
  }
  constexpr char kRow[] = "%-32s %-8s %6s %9s %5s %7s %10s %5s %14s  %s\n";
  session.io.out << absl::StrFormat(kRow, "name", "type", "layers", "heads q/kv", "d", "vocab",
                                    "max tokens", "dtype", "KV bytes/token", "fingerprint");
  for (const v1::Model& model : *models) {
    session.io.out << absl::StrFormat(
        kRow, model.name(), model.model_type(), absl::StrCat(model.layers()),
        absl::StrCat(model.q_heads(), "/", model.kv_heads()), absl::StrCat(model.head_dim()),
        absl::StrCat(model.vocab_size()), absl::StrCat(model.max_prompt_tokens()),
        DtypeName(model.data_type()), absl::StrCat(model.kv_bytes_per_token()),
        model.fingerprint().substr(0, 12));
  }
  return absl::OkStatus();
}

}  // namespace

void AddModels(CLI::App& app, Session& session) {
  CLI::App* command = app.add_subcommand("models", "The models that the server has loaded");
  command->footer("Example: prefillctl models --json");
  command->callback([&session] {
    session.action = [&session](client::PrefillClient& client) {
      return RunModels(client, session);
    };
  });
}

}  // namespace prefilld::cli
