// Prompts of the fixture's model with a place for their caches, and a sink that keeps what it
// hears.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "nlohmann/json.hpp"
#include "server/job.h"
#include "server/kv/kv_cache.h"
#include "server/model/transformer.h"
#include "tests/server/model/model_directory.h"

namespace prefilld {

// Layers in the order in which they were told; read it when all are.
class LayerSink : public JobSink {
 public:
  void OnLayerReady(int layer, double density, double) override {
    if (finished_.HasBeenNotified()) after_the_end = true;
    layers.push_back(layer);
    densities.push_back(density);
    threads.push_back(std::this_thread::get_id());
  }
  void OnFinished(const absl::Status& status) override {
    if (finished_.HasBeenNotified()) {
      after_the_end = true;
      return;
    }
    status_ = status;
    finished_.Notify();
  }
  // How the job ended; UNKNOWN when it does not.
  absl::Status Wait() {
    return finished_.WaitForNotificationWithTimeout(absl::Seconds(20))
               ? status_
               : absl::UnknownError("OnFinished did not come");
  }
  bool finished() const { return finished_.HasBeenNotified(); }

  std::vector<int> layers;
  std::vector<double> densities;
  std::vector<std::thread::id> threads;
  bool after_the_end = false;  // something was told after OnFinished

 private:
  absl::Notification finished_;
  absl::Status status_;
};

// The fixture's model with its second layer again and again, until there are `layers`.
inline void Deepen(const ModelDirectory& model, int layers) {
  model.Replace("config.json", "\"num_hidden_layers\": 2",
                "\"num_hidden_layers\": " + std::to_string(layers));
  const std::string bytes = model.Read("model.safetensors");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  auto header = nlohmann::json::parse(bytes.substr(sizeof header_bytes, header_bytes));
  std::string data = bytes.substr(sizeof header_bytes + header_bytes);
  const std::string prefix = "model.layers.1.";
  const auto once = header;
  for (int layer = 2; layer < layers; ++layer) {
    for (const auto& [name, tensor] : once.items()) {
      if (name.rfind(prefix, 0) != 0) continue;
      const uint64_t begin = tensor["data_offsets"][0], end = tensor["data_offsets"][1];
      auto& copy =
          header["model.layers." + std::to_string(layer) + "." + name.substr(prefix.size())] =
              tensor;
      copy["data_offsets"] = {data.size(), data.size() + end - begin};
      data += data.substr(begin, end - begin);
    }
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  header_bytes = text.size();
  model.Write(
      "model.safetensors",
      std::string(reinterpret_cast<const char*>(&header_bytes), sizeof header_bytes) + text + data);
}

class Prompts {
 public:
  static constexpr int kLayers = 5;

  // Of up to so many tokens.
  explicit Prompts(Backend& backend, int64_t positions = 1024)
      : model_(Load(backend, positions)),
        pool_(*BlockPool::Create(backend.device(), size_t{64} << 20, 128 * 1024)) {}

  // Whoever finishes a job on another thread lets go of its cache last.
  ~Prompts() { EXPECT_TRUE(pool_->WaitAllFree(SteadyNow() + absl::Seconds(30))); }

  const ModelInfo& info() const { return model_->info(); }
  // waiting: its cache takes its blocks when it starts.
  std::shared_ptr<Job> New(int64_t tokens, int salt, bool retain = true,
                           bool waiting = false) const {
    auto job = std::make_shared<Job>();
    job->policy.method = Method::kJoint;
    job->prefill = std::make_unique<PrefillWork>();
    job->prefill->model = model_.get();
    job->prefill->return_logits = true;
    for (int64_t t = 0; t < tokens; ++t) {
      job->prefill->token_ids.push_back(static_cast<uint32_t>((t * 31 + salt) % info().vocab_size));
    }
    const KvGeometry geometry{info().layers, info().kv_heads, info().head_dim, info().dtype,
                              tokens};
    job->prefill->cache = waiting ? KvCache::CreateWaiting(*pool_, geometry, retain)
                                  : *KvCache::Create(*pool_, geometry, retain);
    job->sink = std::make_shared<LayerSink>();
    return job;
  }
  BlockPool& pool() const { return *pool_; }
  static LayerSink& SinkOf(const std::shared_ptr<Job>& job) {
    return static_cast<LayerSink&>(*job->sink);
  }

 private:
  static std::unique_ptr<Transformer> Load(Backend& backend, int64_t positions) {
    const ModelDirectory directory("base");  // mapped when it goes
    directory.Replace("config.json", "\"max_position_embeddings\": 1024",
                      "\"max_position_embeddings\": " + std::to_string(positions));
    Deepen(directory, kLayers);
    return *Transformer::Load("m", directory.path(), backend);
  }

  const std::unique_ptr<Transformer> model_;
  const std::unique_ptr<BlockPool> pool_;
};

}  // namespace prefilld
