#include "server/transport/transports.h"

#include <algorithm>
#include <cstdlib>

namespace prefilld {
namespace {

template <typename Is>
const TransportRow* Find(const Is& is) {
  const auto row = std::find_if(kTransports.begin(), kTransports.end(), is);
  return row == kTransports.end() ? nullptr : &*row;
}

}  // namespace

const TransportRow& RowOf(Transport transport) {
  const TransportRow* row = Find([&](const TransportRow& r) { return r.transport == transport; });
  if (row == nullptr) std::abort();  // a transport without a row
  return *row;
}

const TransportRow* FindTransport(absl::string_view name) {
  return Find([&](const TransportRow& row) { return row.name == name; });
}

const TransportRow* FindTransportOfWire(int wire) {
  return Find([&](const TransportRow& row) { return row.wire == wire; });
}

}  // namespace prefilld
