// SPDX-License-Identifier: MIT
#pragma once
/// @file  Files in and out: the one error for files that cannot be used, and writing that leaves no half-written file.
///
/// Contract   `write_whole` writes beside the target and renames: the target is either the old file or the complete new one.
/// Errors     file_error, one line: "PATH: what is wrong".

#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include <fovea/core/contract.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct file_error : std::runtime_error {
  file_error(const std::string& path, const std::string& what) : std::runtime_error(path + ": " + what) {}
  /// What a file's contents led to: the contract's sentence without its own prefix.
  file_error(const std::string& path, const contract_error& e) : file_error(path, sentence(e.what())) {}

 private:
  static std::string sentence(const std::string& what) { return what.starts_with("fovea: ") ? what.substr(7) : what; }
};

/// Opens a regular file for reading and says how long it is.
inline std::pair<std::ifstream, std::uint64_t> open_for_reading(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) throw file_error(path, "no such file");
  if (status.type() != std::filesystem::file_type::regular) throw file_error(path, "not a regular file");
  const auto size = std::filesystem::file_size(path, error);
  std::ifstream in(path, std::ios::binary);
  if (error || !in) throw file_error(path, "cannot be opened for reading");
  return {std::move(in), static_cast<std::uint64_t>(size)};
}

/// All of a text file of at most `limit` bytes.
inline std::string read_text(const std::string& path, std::uint64_t limit) {
  auto [in, size] = open_for_reading(path);
  if (size > limit)
    throw file_error(path,
                     "is " + std::to_string(size) + " bytes long; at most " + std::to_string(limit) + " are read");
  std::string text(static_cast<std::size_t>(size), '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (in.gcount() != static_cast<std::streamsize>(text.size())) throw file_error(path, "could not be read to its end");
  return text;
}

/// write(stream) fills a new file that then takes the place of `path`.
template <class Write>
void write_whole(const std::string& path, Write&& write) {
  namespace fs = std::filesystem;
  std::error_code error;
  const auto status = fs::status(path, error);
  if (fs::exists(status) && !fs::is_regular_file(status)) throw file_error(path, "exists and is not a regular file");
  const fs::path target = fs::exists(status) ? fs::canonical(path, error) : fs::path(path);
  if (error && fs::exists(status)) throw file_error(path, "cannot be resolved: " + error.message());
  std::ostringstream suffix;
  suffix << ".partial-" << std::hex << std::random_device{}();
  const fs::path partial = target.string() + suffix.str();
  const auto drop = [&] { fs::remove(partial, error); };
  try {
    std::ofstream out(partial, std::ios::binary | std::ios::trunc);
    if (!out) throw file_error(path, "cannot be written here");
    write(out);
    out.close();
    if (!out) throw file_error(path, "could not be written to its end (is the disk full?)");
  } catch (...) {
    drop();
    throw;
  }
  fs::rename(partial, target, error);
  if (!error) return;
  const std::string reason = error.message();
  drop();
  throw file_error(path, "could not be put in its place: " + reason);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
