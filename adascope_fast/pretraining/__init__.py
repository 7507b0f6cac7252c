"""How the embedded models were made: drawn scenes, an autoencoder, two small denoisers."""
