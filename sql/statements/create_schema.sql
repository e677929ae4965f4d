create schema pgonce
