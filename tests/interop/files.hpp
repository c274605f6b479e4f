// SPDX-License-Identifier: MIT
#pragma once
/// @file  Shared by the interop tests: a temporary folder, bytes into files, and the line of an error.

#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "support/catch.hpp"

namespace test {

/// A folder of its own for each test, removed afterwards.
struct folder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("fovea-test-" + std::to_string(std::random_device{}()));
  folder() { std::filesystem::create_directories(path); }
  folder(const folder&) = delete;
  folder& operator=(const folder&) = delete;
  ~folder() {
    std::error_code error;
    std::filesystem::remove_all(path, error);
  }
  std::string file(const std::string& name) const { return (path / name).string(); }
  std::size_t files() const {
    return static_cast<std::size_t>(
        std::distance(std::filesystem::directory_iterator(path), std::filesystem::directory_iterator{}));
  }
};

inline void put(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

/// The message of the Error that f throws; it must be one line.
template <class Error = std::exception, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    const std::string line = e.what();
    INFO(line);
    CHECK(line.find('\n') == std::string::npos);
    return line;
  }
  return "nothing was thrown";
}

/// For CHECK: prints both when it fails.
inline bool holds(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  UNSCOPED_INFO("got:    " << text << "\nwanted: " << part);
  return false;
}

}  // namespace test
