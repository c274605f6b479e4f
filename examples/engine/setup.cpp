// SPDX-License-Identifier: MIT
#include "setup.hpp"

#include "policy.hpp"

namespace engine {

setup::setup(const model_options& o)
    : net(o.model),
      threads(o.threads),
      plan(o.attention.empty() ? exact_plan(net.config()) : read_policy(o.attention, net.config())) {}

}  // namespace engine
