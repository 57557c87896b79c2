"""`fastdit train-vae`: the training of an autoencoder (diffusers AutoencoderKL) on images."""
