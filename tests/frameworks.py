"""What the suite itself needs of each framework: make arrays, read them back, take gradients.

One entry a framework in ``HARNESS``; ``conftest.py`` checks that its keys are those of scree's ``FRAMEWORKS``.
Nothing here imports scree, so that a fault there cannot hide in the harness.
"""

import importlib
import os

import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8")


def np_dtype(name):
    """Return NumPy's dtype of that name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def has_bfloat16():
    """Say whether NumPy can hold bfloat16 here."""
    try:
        import ml_dtypes  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


class Harness:
    """What is common; each framework below fills in the rest."""

    name = ""
    device_kind = "cpu"  # where `array` puts its arrays
    has_gradients = False
    checks_at_construction = False  # offsets are on the host, so bad ones are an error at once
    has_views = False
    compiles_per_shape = False  # new shapes are dear: tests share shapes and draw few examples

    def __init__(self, module):
        self.module = module

    def __repr__(self):
        return self.name

    @property
    def floats(self):
        """The floating dtypes that the framework has here."""
        return FLOATS

    @property
    def integers(self):
        """The integer dtypes that the framework has here."""
        return INTEGERS

    @property
    def dtypes(self):
        """Every dtype that the suite uses."""
        return (*self.floats, *self.integers, "bool")

    @property
    def examples(self):
        """How many examples a property is worth."""
        return 4 if self.compiles_per_shape else 40

    def array(self, data, dtype=None):
        """Make an array of the framework from NumPy data or a list."""
        raise NotImplementedError

    def to_np(self, x):
        """Return a NumPy copy; bfloat16 becomes float32, which holds every value of it."""
        raise NotImplementedError

    def dtype_of(self, x):
        """Return the dtype's plain name."""
        return str(x.dtype).rsplit(".", 1)[-1]

    def is_array(self, x):
        """Say whether x belongs to the framework."""
        raise NotImplementedError

    def shares_memory(self, a, b):
        """Say whether two arrays overlap in memory."""
        raise NotImplementedError

    def run(self, fn, *arrays):
        """Return fn(*arrays), compiled as one program where one an operation would take long to compile."""
        return fn(*arrays)

    def grad(self, fn, *arrays):
        """Return d fn(*arrays) / d arrays, each as NumPy; fn gives a scalar of the framework."""
        raise NotImplementedError

    def eager_grad(self, fn, *arrays):
        """Return the same without a compiler, which may round two programs differently: for comparing bits."""
        return self.grad(fn, *arrays)

    def jit_grad(self, fn, *arrays):
        """Return the same compiled as in a user's program: for comparing bits where an eager gradient takes long."""
        return self.grad(fn, *arrays)

    def _cast(self, data, dtype):
        data = np.asarray(data)
        if dtype is None:
            dtype = "float32" if data.dtype.kind == "f" else str(data.dtype)
        return data.astype(np_dtype(dtype)), dtype


class NumPy(Harness):
    name = "numpy"
    checks_at_construction = True
    has_views = True

    @property
    def floats(self):
        return FLOATS if has_bfloat16() else tuple(f for f in FLOATS if f != "bfloat16")

    def array(self, data, dtype=None):
        return self._cast(data, dtype)[0]

    def to_np(self, x):
        assert type(x) is np.ndarray, f"a plain ndarray was wanted, got {type(x)}"
        return x.astype(np.float32) if x.dtype.name == "bfloat16" else x.copy()

    def is_array(self, x):
        return type(x) is np.ndarray

    def shares_memory(self, a, b):
        return np.shares_memory(a, b)


class Torch(Harness):
    """PyTorch on the CPU, or on the device that ``SCREE_TORCH_DEVICE`` names: the suite runs there untouched."""

    name = "torch"
    has_gradients = True
    has_views = True
    device = os.environ.get("SCREE_TORCH_DEVICE", "cpu")
    device_kind = device.partition(":")[0]
    checks_at_construction = device_kind == "cpu"

    def array(self, data, dtype=None, device=None):
        device = self.device if device is None else device
        data = np.asarray(data)
        if dtype is None:
            dtype = "float32" if data.dtype.kind == "f" else str(data.dtype)
        wide = data.astype(np.float64) if dtype in FLOATS else data.astype(dtype)
        return (
            self.module.from_numpy(np.ascontiguousarray(wide))
            .reshape(data.shape)
            .to(dtype=getattr(self.module, dtype), device=device, copy=True)
        )

    def to_np(self, x):
        x = x.detach().cpu()
        return (x.float() if x.dtype == self.module.bfloat16 else x.clone()).numpy()

    def is_array(self, x):
        return isinstance(x, self.module.Tensor)

    def shares_memory(self, a, b):
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()

    def grad(self, fn, *arrays):
        leaves = [a.detach().clone().requires_grad_() for a in arrays]
        grads = self.module.autograd.grad(fn(*leaves), leaves, allow_unused=True)
        return [np.zeros(tuple(a.shape)) if g is None else self.to_np(g) for a, g in zip(leaves, grads, strict=True)]


class Jax(Harness):
    """JAX. XLA hardly optimises what ``jit``, ``run`` and ``grad`` compile: that would take most of the time.

    Bits are not compared of these: users' programs are compiled otherwise.
    """

    name = "jax"
    has_gradients = True
    compiles_per_shape = True

    @property
    def device_kind(self):
        return self.module.default_backend()

    @property
    def x64(self):
        import jax

        return bool(jax.config.jax_enable_x64)

    @property
    def floats(self):
        return FLOATS if self.x64 else FLOATS[:3]

    @property
    def integers(self):
        return INTEGERS if self.x64 else tuple(i for i in INTEGERS if i != "int64")

    def array(self, data, dtype=None):
        import jax.numpy as jnp

        cast, dtype = self._cast(data, dtype)
        if not self.x64 and dtype in ("int64", "uint64"):
            cast = cast.astype(dtype.replace("64", "32"))
        return jnp.asarray(cast)

    def to_np(self, x):
        x = np.asarray(x)
        return x.astype(np.float32) if x.dtype.name == "bfloat16" else x.copy()

    def is_array(self, x):
        return isinstance(x, self.module.Array)

    def jit(self, fn):
        if self.device_kind != "cpu" or self.module.__version_info__ < (0, 7):
            return self.module.jit(fn)
        options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
        return self.module.jit(fn, compiler_options=options)

    def run(self, fn, *arrays):
        return self.jit(fn)(*arrays)

    def grad(self, fn, *arrays):
        # One program instead of one an operation: an eager gradient costs tens of seconds of compilation.
        return [self.to_np(g) for g in self.run(self._grad(fn, arrays), *arrays)]

    def eager_grad(self, fn, *arrays):
        return [self.to_np(g) for g in self._grad(fn, arrays)(*arrays)]

    def jit_grad(self, fn, *arrays):
        return [self.to_np(g) for g in self.module.jit(self._grad(fn, arrays))(*arrays)]

    def _grad(self, fn, arrays):
        return self.module.grad(fn, argnums=tuple(range(len(arrays))))


class Mlx(Harness):
    name = "mlx"
    has_gradients = True

    @property
    def device_kind(self):
        return "cpu" if self.module.default_device() == self.module.cpu else "gpu"

    @property
    def floats(self):
        return FLOATS if self.device_kind == "cpu" else FLOATS[:3]

    def array(self, data, dtype=None):
        mx = self.module
        data = np.asarray(data)
        if dtype is None:
            dtype = "float32" if data.dtype.kind == "f" else str(data.dtype)
        if dtype == "bfloat16":
            return mx.array(data.astype(np_dtype(dtype)).astype(np.float32)).astype(mx.bfloat16)
        return mx.array(data.astype(dtype), dtype=getattr(mx, "bool_" if dtype == "bool" else dtype))

    def to_np(self, x):
        return np.array(x.astype(self.module.float32) if x.dtype == self.module.bfloat16 else x)

    def is_array(self, x):
        return isinstance(x, self.module.array)

    def grad(self, fn, *arrays):
        grads = self.module.grad(fn, argnums=tuple(range(len(arrays))))(*arrays)
        return [self.to_np(g) for g in (grads if isinstance(grads, (tuple, list)) else [grads])]


class CuPy(Harness):
    name = "cupy"
    device_kind = "cuda"

    @property
    def floats(self):
        return ("float16", "float32", "float64")

    def array(self, data, dtype=None):
        return self.module.asarray(self._cast(data, dtype)[0])

    def to_np(self, x):
        return self.module.asnumpy(x)

    def is_array(self, x):
        return isinstance(x, self.module.ndarray)


HARNESS = {"numpy": NumPy, "torch": Torch, "jax": Jax, "mlx": Mlx, "cupy": CuPy}


def load(name, module_name):
    """Return the harness of a framework, or the reason (text) why it cannot run here."""
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        return f"{name}: {error}"
    if name == "cupy":
        try:
            count = module.cuda.runtime.getDeviceCount()
        except module.cuda.runtime.CUDARuntimeError as error:
            return f"{name}: {error}"
        if count == 0:
            return f"{name}: no CUDA device"
    return HARNESS[name](module)
