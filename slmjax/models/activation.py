"""What a feed-forward does between its two products."""

import jax
import jax.numpy as jnp


def activate(activation: str, *products):
    """The hidden units, from the up product or, when gated, from the gate and up products.

    swiglu and geglu (2002.05202) are gated; gelu and relu2 (squared ReLU, 2109.08668) are not.
    """
    match activation:
        case "swiglu":
            return jax.nn.silu(products[0]) * products[1]
        case "geglu":
            return jax.nn.gelu(products[0], approximate=True) * products[1]
        case "gelu":
            return jax.nn.gelu(products[0], approximate=True)
        case "relu2":
            return jnp.square(jax.nn.relu(products[0]))
    raise ValueError(f"activation is {activation!r}; choose from swiglu, geglu, gelu, relu2")
