// A limit that peers share: the last eighth of it is for those that have less than an eighth, so
// that one that takes what it can get leaves others a place. Pure.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace prefilld {

class SharedLimit {
 public:
  explicit SharedLimit(int64_t most) : most_(most) {}

  // The first may have all that it needs.
  bool HasRoom(const std::string& peer, int64_t amount) const {
    const auto found = by_peer_.find(peer);
    const int64_t has = found == by_peer_.end() ? 0 : found->second, reserved = most_ / 8;
    const int64_t most = has + amount <= reserved ? most_ : most_ - reserved;
    return (used_ == 0 && most_ > 0) || used_ + amount <= most;
  }
  void Take(const std::string& peer, int64_t amount) {
    used_ += amount;
    by_peer_[peer] += amount;
  }
  void GiveBack(const std::string& peer, int64_t amount) {
    used_ -= amount;
    const auto found = by_peer_.find(peer);
    if ((found->second -= amount) == 0) by_peer_.erase(found);
  }
  int64_t used() const { return used_; }
  int64_t most() const { return most_; }

 private:
  const int64_t most_;
  int64_t used_ = 0;
  std::map<std::string, int64_t> by_peer_;
};

}  // namespace prefilld
