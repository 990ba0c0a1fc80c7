// The activations that channel_scale knows. Torch-free.
#pragma once

namespace taskloom {

enum class Activation : int { none, relu, gelu, silu };

}  // namespace taskloom
