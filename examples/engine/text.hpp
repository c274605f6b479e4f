// SPDX-License-Identifier: MIT
#pragma once
/// @file  Where token ids come from: raw little-endian u32, or UTF-8 text through the model's tokeniser.

#include <string>
#include <vector>

#include "tokenizer.hpp"

namespace engine {

/// All ids of a file of u32.
std::vector<token> read_ids(const std::string& path);

/// DIR/tokenizer.json.
tokenizer tokenizer_of(const std::string& model_directory);

/// Ids of a .bin file, or of a text.
std::vector<token> read_tokens(const std::string& path, const std::string& model_directory, bool is_text);

}  // namespace engine
