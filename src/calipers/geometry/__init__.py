"""Why is a model fragile? Its gradients, the linear regions it is made of, and pictures of both."""
