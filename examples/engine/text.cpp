// SPDX-License-Identifier: MIT
#include "text.hpp"

#include <cstring>
#include <filesystem>

#include <fovea/interop/file.hpp>

namespace engine {

std::vector<token> read_ids(const std::string& path) {
  const std::string bytes = fovea::read_text(path, std::uint64_t{4} << 30);
  if (bytes.size() % sizeof(token) != 0)
    throw fovea::file_error(path, "is " + std::to_string(bytes.size()) + " bytes long; token ids are 4 bytes each");
  std::vector<token> ids(bytes.size() / sizeof(token));
  if (!ids.empty()) std::memcpy(ids.data(), bytes.data(), bytes.size());
  return ids;
}

tokenizer tokenizer_of(const std::string& model_directory) {
  return tokenizer((std::filesystem::path(model_directory) / "tokenizer.json").string());
}

std::vector<token> read_tokens(const std::string& path, const std::string& model_directory, bool is_text) {
  if (!is_text) return read_ids(path);
  return tokenizer_of(model_directory).encode(fovea::read_text(path, std::uint64_t{1} << 30));
}

}  // namespace engine
