// What every peer has had of the engine: whoever has had least is next. In virtual time, which goes
// on as those are served who have work: a peer that had none gains nothing by that, and one that
// took more than its share has that against it until the others have had as much. Pure.
#pragma once

#include <map>
#include <set>
#include <string>

namespace prefilld {

class FairShares {
 public:
  // These have work now, the others have none. Before Served and Serve.
  void SetBusy(const std::set<std::string>& peers);
  double Served(const std::string& peer) const;  // seconds
  void Serve(const std::string& peer, double seconds);

 private:
  std::map<std::string, double> served_;  // of who has work, or is ahead of level_
  std::set<std::string> busy_;            // who has work
  double level_ = 0;                      // the least of theirs; it never goes back
};

}  // namespace prefilld
