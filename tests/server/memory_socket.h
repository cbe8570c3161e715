// Names of regions and the socket that hands them out, as a server has them. To be made after the
// device whose memory it hands out, and so to go before it.
#pragma once

#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/transport/descriptor_socket.h"
#include "server/transport/region_names.h"

namespace prefilld {

struct MemorySocket {
  const std::string& address() const { return socket->address(); }

  std::shared_ptr<RegionNames> names = std::make_shared<RegionNames>();
  std::unique_ptr<DescriptorSocket> socket = *DescriptorSocket::Listen(
      {.address = Address(),
       .find = [names = names](const std::string& name) { return names->HandOut(name); },
       .told = [](DescriptorSocket::Outcome) {}});

 private:
  static std::string Address() {
    static std::atomic<int> next{0};
    return absl::StrCat("@prefilld-test-memory-", getpid(), "-", next++);
  }
};

}  // namespace prefilld
