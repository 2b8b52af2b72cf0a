"""What is checked while the tests run: calls of functions whose signature names a tensor, by jaxtyping and beartype.

Others have plain types alone, which mypy reads. Functions within functions would be compiled anew whenever the one
around them is called; those of HOT run for every linear layer or head of every forward. Together they took more than
half of the tests' time.
"""

import ast

from beartype import beartype
from jaxtyping import _import_hook

HOT = ("onednn", "multiplies", "_multiply", "_act", "_value", "_all")


class Tensors(_import_hook.JaxtypingTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:  # noqa: N802
        within = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
        signature = ast.unparse(node.args) + (ast.unparse(node.returns) if node.returns else "")
        if within or node.name in HOT or "Tensor" not in signature:
            return node
        return super().visit_FunctionDef(node)


def check(function):
    """Compiled files are kept by this name: under that of beartype, others hold what its own hook makes."""
    return beartype(function)


def shapes_checked():
    """Within: what is imported of engine and models is checked from then on."""
    _import_hook.JaxtypingTransformer = Tensors
    return _import_hook.install_import_hook(["engine", "models"], f"{__name__}.check")
