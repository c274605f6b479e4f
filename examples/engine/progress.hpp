// SPDX-License-Identifier: MIT
#pragma once
/// @file  One line on a terminal that says how far a long measurement is; nothing where stderr is no terminal.

#include <unistd.h>

#include <cstdio>
#include <string>

#include <fovea/core/types.hpp>

namespace engine {

class progress {
 public:
  progress(std::string what, fovea::isize all)
      : what_(std::move(what)), all_(all), shown_(isatty(STDERR_FILENO) != 0) {}
  progress(const progress&) = delete;
  progress& operator=(const progress&) = delete;
  ~progress() {
    if (shown_) std::fprintf(stderr, "\r%60s\r", "");
  }
  void step() { show(done_ + 1, all_); }
  void show(fovea::isize done, fovea::isize all) {
    done_ = done, all_ = all;
    if (shown_) std::fprintf(stderr, "\r%s: %td of %td ", what_.c_str(), done_, all_), std::fflush(stderr);
  }

 private:
  std::string what_;
  fovea::isize done_ = 0, all_;
  bool shown_;
};

}  // namespace engine
