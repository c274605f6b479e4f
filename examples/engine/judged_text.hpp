// SPDX-License-Identifier: MIT
#pragma once
/// @file  What attention is judged on: windows of a text, and a text made of it that cannot be predicted without retrieval.
///
///   plain   windows of `context` tokens, evenly spread; every prediction counts
///   copy    of each window the first half, its pieces of 16 tokens shuffled, then the same tokens once more: the second half can
///           be predicted by looking 16 pieces and more back, and by nothing else. Only its predictions count

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "session.hpp"
#include "tokenizer.hpp"

namespace engine {

struct judged_window {
  std::vector<token> tokens;
  isize from = 1;  ///< the first token whose prediction counts
};
struct judged_text {
  std::string name, source;
  bool retrieval = false;
  std::vector<judged_window> windows;
  isize predictions() const;
};

judged_text plain_text(const std::string& name, std::span<const token> ids, isize context, isize windows);
judged_text copy_text(const std::string& name, std::span<const token> ids, isize context, isize windows);

struct text_choice {
  std::vector<std::string> files;  ///< raw u32 ids where the name ends in .bin, else UTF-8
  std::string copy;                ///< file of the copy text; "": the first of `files`
  bool without_copy = false;
  isize context = 1024, windows = 2;
  double first = 0, last = 1;  ///< the part of each file that windows are taken from
};
std::vector<judged_text> choose_texts(const text_choice& c, const std::string& model_directory);

}  // namespace engine
