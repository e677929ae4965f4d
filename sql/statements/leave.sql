select pgonce.leave($1)
