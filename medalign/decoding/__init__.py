"""How answers are decoded: the settings of generation, and methods that choose tokens in another way.

A method (`base.Method`) is a frozen dataclass whose fields are its settings. It overrides one of two functions:

applied(student, batch, decoding)     a context manager around `Student.generate`. It yields a `Prepared`: the batch
                                      that the student reads, and logits processors. A contrast of two views is a batch
                                      of 2 B rows, of which the last B are the second view, and a processor that gives
                                      both rows of a sample the same scores, so that both continue with the same token.
                                      An intervention sets attributes of attention modules, which the attention function
                                      of `student.capture` reads, and removes them at the end.
generate(student, batch, decoding)    the whole generation, for what is neither a change of logits nor of a forward
                                      pass, such as a beam search of its own.

`check` refuses a student before its weights are read; `beams` and `samples` say why a method refuses beam search or
sampling. Sampling is the last logits processor of every method.

A packaged method is a file of `methods/` with a line in `registry.METHODS`. A method of another package is given by its
import path. This module and the registry import nothing heavy, since the help of the command line reads them.
"""
