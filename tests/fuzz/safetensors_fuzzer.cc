// Any bytes as a safetensors file, for the server's reader (model weights, strict) and the client's
// (tensors of a caller): what they list lies within the file, and they read the same of it.
#include <stdlib.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "client/cpp/safetensors.h"
#include "server/model/safetensors.h"
#include "tests/fuzz/property.h"

namespace prefilld {
namespace {

// A directory in memory, that goes with the process.
struct Directory {
  std::string path, file;
  Directory() {
    char name[] = "/dev/shm/safetensors_fuzzer-XXXXXX";
    Promise(mkdtemp(name) != nullptr, "there is a directory", name);
    path = name;
    file = path + "/model.safetensors";
  }
  ~Directory() {
    unlink(file.c_str());
    rmdir(path.c_str());
  }
};

void Write(const std::string& path, const uint8_t* data, size_t size) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  Promise(file != nullptr && std::fwrite(data, 1, size, file) == size && std::fclose(file) == 0,
          "the file is written", path);
}

// Of a row-major tensor of the server's; reads all of it.
void CheckTensor(const std::string& name, const SafeTensor& tensor, size_t file_bytes) {
  Promise(tensor.bytes <= file_bytes, "a tensor lies within the file", name);
  unsigned __int128 elements = 1;
  for (const int64_t side : tensor.shape) {
    Promise(side >= 0, "sides are sizes", name);
    elements *= static_cast<uint64_t>(side);
    if (elements > file_bytes) elements = elements == 0 ? 0 : file_bytes + 1;
  }
  Promise(elements <= tensor.bytes, "an element has a byte or more", name);
  volatile unsigned sum = 0;
  for (size_t i = 0; i < tensor.bytes; ++i) sum = sum + static_cast<unsigned>(tensor.data[i]);
}

void CheckSame(const std::string& name, const SafeTensor& server,
               const client::InputTensor& client) {
  Promise(std::equal(server.shape.begin(), server.shape.end(), client.spec.shape().begin(),
                     client.spec.shape().end()),
          "both read one shape", client::Describe(client.spec));
  const auto bytes = client::TensorBytes(client.spec);
  Promise(bytes.ok() && *bytes == server.bytes &&
              std::memcmp(client.data, server.data, server.bytes) == 0,
          "both read the same bytes", name);
}

}  // namespace
}  // namespace prefilld

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld;  // NOLINT
  static const Directory directory;
  Write(directory.file, data, size);
  const auto server = SafeTensors::Open(directory.path);
  const auto client = client::SafetensorsFile::Open(directory.file);
  if (client.ok()) {
    for (const client::InputTensor& tensor : client->tensors()) {
      const auto bytes = client::TensorBytes(tensor.spec);
      Promise(bytes.ok() && *bytes <= size, "a listed tensor lies within the file",
              client::Describe(tensor.spec));
      volatile unsigned sum = 0;
      for (uint64_t i = 0; i < *bytes; ++i) {
        sum = sum + static_cast<const uint8_t*>(tensor.data)[i];
      }
    }
  } else {
    Promise(absl::IsInvalidArgument(client.status()), "a bad file is INVALID_ARGUMENT",
            client.status().ToString());
  }
  if (!server.ok()) {
    Promise(absl::IsInvalidArgument(server.status()), "a bad file is INVALID_ARGUMENT",
            server.status().ToString());
    Promise(server.status().message().find('\n') == absl::string_view::npos, "an error is one line",
            server.status().ToString());
    return 0;
  }
  for (const auto& [name, tensor] : server->tensors()) {
    CheckTensor(name, tensor, size);
    const client::InputTensor* other = client.ok() ? client->Find(name) : nullptr;
    if (other != nullptr) CheckSame(name, tensor, *other);
  }
  return 0;
}
