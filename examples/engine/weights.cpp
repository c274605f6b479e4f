// SPDX-License-Identifier: MIT
#include "weights.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace engine {
namespace {

std::string describe(const std::vector<isize>& dims) {
  std::string text;
  for (const isize x : dims) text += (text.empty() ? "[" : ", ") + std::to_string(x);
  return text + "]";
}

fovea::dtype type_of(const fovea::safetensors_entry& e) {
  return e.type == fovea::element::f32   ? fovea::dtype::f32
         : e.type == fovea::element::f16 ? fovea::dtype::f16
                                         : fovea::dtype::bf16;
}

}  // namespace

mapped_file::mapped_file(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw fovea::file_error(path, std::string("cannot be opened: ") + std::strerror(errno));
  struct stat about {};
  const bool regular = ::fstat(file, &about) == 0 && S_ISREG(about.st_mode);
  size_ = regular ? static_cast<std::size_t>(about.st_size) : 0;
  void* at = size_ == 0 ? MAP_FAILED : ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
  const int reason = errno;
  ::close(file);
  if (!regular) throw fovea::file_error(path, "not a regular file");
  if (size_ == 0) throw fovea::file_error(path, "is empty");
  if (at == MAP_FAILED) throw fovea::file_error(path, std::string("cannot be mapped: ") + std::strerror(reason));
  ::madvise(at, size_, MADV_WILLNEED);
  data_ = static_cast<const std::byte*>(at);
}

mapped_file::~mapped_file() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

weights::weights(const std::string& path) : path_(path), file_(path) {
  std::uint64_t length = 0;
  if (file_.size() >= sizeof length) std::memcpy(&length, file_.data(), sizeof length);
  if (file_.size() < sizeof length || length > file_.size() - sizeof length)
    throw fovea::file_error(path, "is truncated or not a safetensors file: " + std::to_string(file_.size()) +
                                      " bytes, and a header of " + std::to_string(length) + " announced");
  const std::string text(reinterpret_cast<const char*>(file_.data()) + sizeof length, static_cast<std::size_t>(length));
  data_ = file_.data() + sizeof length + length;
  header_ = fovea::parse_safetensors_header(text, file_.size() - sizeof length - length, path);
}

const fovea::safetensors_entry& weights::find(const std::string& name, const std::vector<isize>& dims) const {
  const auto at = header_.entries.find(name);
  if (at == header_.entries.end()) throw fovea::file_error(path_, "has no tensor \"" + name + "\"");
  const fovea::safetensors_entry& e = at->second;
  const auto stop = [&](const std::string& what) { throw fovea::file_error(path_, "tensor \"" + name + "\" " + what); };
  if (e.dims != dims) stop("is " + describe(e.dims) + "; the configuration asks for " + describe(dims));
  if (e.type != fovea::element::f32 && e.type != fovea::element::f16 && e.type != fovea::element::bf16)
    stop(std::string("is ") + fovea::name_of(e.type) + "; wanted f32, f16 or bf16");
  if (reinterpret_cast<std::uintptr_t>(data_ + e.begin) % fovea::size_of(e.type) != 0)
    stop("does not lie at a multiple of its element's size");
  return e;
}

matrix weights::matrix_of(const std::string& name, isize rows, isize columns) const {
  const fovea::safetensors_entry& e = find(name, {rows, columns});
  return {data_ + e.begin, type_of(e), rows, columns};
}

std::vector<float> weights::vector_of(const std::string& name, isize size) const {
  const fovea::safetensors_entry& e = find(name, {size});
  std::vector<float> out(static_cast<std::size_t>(size));
  for (isize i = 0; i < size; ++i)
    out[static_cast<std::size_t>(i)] = static_cast<float>(fovea::load_as_double(type_of(e), data_ + e.begin, i));
  return out;
}

}  // namespace engine
