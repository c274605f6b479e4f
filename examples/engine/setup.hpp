// SPDX-License-Identifier: MIT
#pragma once
/// @file  What the commands share: the model, its threads and its attention plan, from their options.

#include "commands.hpp"
#include "pool.hpp"
#include "session.hpp"

namespace engine {

struct setup {
  explicit setup(const model_options& o);
  model net;
  pool threads;
  attention_plan plan;
};

}  // namespace engine
