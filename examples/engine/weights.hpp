// SPDX-License-Identifier: MIT
#pragma once
/// @file  A safetensors file mapped into memory: tensors are views of the file's pages, nothing is copied.
///
///   weights w("model.safetensors");
///   matrix q = w.matrix_of("model.layers.0.self_attn.q_proj.weight", 576, 576);
///
/// Contract   the whole header is checked before a tensor is handed out: a truncated file, a missing tensor, another shape or type than
///            f32, f16, bf16 are refused by a sentence. Views live as long as the object.

#include <cstddef>
#include <string>
#include <vector>

#include <fovea/interop/safetensors_header.hpp>

namespace engine {

using fovea::isize;

/// A weight [rows, columns], row-major, in the type of the file; y = x W^T has `rows` elements.
struct matrix {
  const void* data = nullptr;
  fovea::dtype type = fovea::dtype::f32;
  isize rows = 0, columns = 0;

  std::size_t bytes() const { return static_cast<std::size_t>(rows * columns) * fovea::size_of(type); }
  const void* row(isize i) const {
    return static_cast<const std::byte*>(data) + i * columns * static_cast<isize>(fovea::size_of(type));
  }
};

/// A file's bytes, read-only, for the life of the object.
class mapped_file {
 public:
  explicit mapped_file(const std::string& path);
  mapped_file(const mapped_file&) = delete;
  mapped_file& operator=(const mapped_file&) = delete;
  ~mapped_file();
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

class weights {
 public:
  explicit weights(const std::string& path);

  bool contains(const std::string& name) const { return header_.entries.contains(name); }
  matrix matrix_of(const std::string& name, isize rows, isize columns) const;
  std::vector<float> vector_of(const std::string& name, isize size) const;
  const std::string& path() const { return path_; }

 private:
  const fovea::safetensors_entry& find(const std::string& name, const std::vector<isize>& dims) const;

  std::string path_;
  mapped_file file_;
  const std::byte* data_ = nullptr;
  fovea::safetensors_header header_;
};

}  // namespace engine
