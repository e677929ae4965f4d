select pgonce.sample_rates()
