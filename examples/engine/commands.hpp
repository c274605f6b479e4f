// SPDX-License-Identifier: MIT
#pragma once
/// @file  The program's commands: what each is told, and what it does. engine.cpp reads the command line; a command throws or returns 0.

#include <cstdint>
#include <string>
#include <vector>

#include <fovea/core/types.hpp>

namespace engine {

using fovea::isize;

/// What every command that runs the model is told.
struct model_options {
  std::string model;      ///< directory of config.json, model.safetensors, tokenizer.json
  std::string attention;  ///< policy file; empty: exact everywhere
  fovea::dtype cache = fovea::dtype::f16;
  int threads = 1;
};

struct generate_options : model_options {
  std::string prompt;
  isize count = 200;
  isize context = 0;  ///< 0: the model's
  double temperature = 0.8, top_p = 0.95;
  std::uint64_t seed = 1;
  bool past_end = false;  ///< go on behind the model's end token
};
int generate(const generate_options& o);

struct perplexity_options : model_options {
  std::string tokens, text;           ///< one of them: raw u32 ids, or UTF-8
  std::vector<std::int64_t> offsets;  ///< first token of each window; empty: window behind window, to the end
  isize context = 1024;               ///< tokens of a window
  isize chunk = 256;                  ///< tokens of one forward call
  isize batch = 1;                    ///< windows run together
  bool json = false;
};
int perplexity(const perplexity_options& o);

struct capture_options : model_options {
  std::string input;  ///< raw u32 ids (.bin), or UTF-8 text
  std::string output = "qkv.safetensors";
  std::vector<isize> layers = {0};
  std::int64_t offset = 0;
  isize count = 1024;
  bool half = false;  ///< store f16
};
int capture(const capture_options& o);

struct bench_options : model_options {
  std::vector<isize> contexts = {512, 2048, 4096, 8192};
  isize to = 65536;  ///< a policy of constant memory goes on from the last context, doubling it, up to here
  isize steps = 32;  ///< decode steps timed behind each context
  isize rows = 512;  ///< tokens of one part of a prefill
  bool json = false;
};
int bench(const bench_options& o);

struct tokens_options {
  std::string model, text, output;
};
int tokens(const tokens_options& o);

}  // namespace engine
