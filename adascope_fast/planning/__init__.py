"""What a training would cost, and where AdaScope would train, before anything is trained."""
