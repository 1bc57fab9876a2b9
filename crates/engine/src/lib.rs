//! One thread that runs the serving loop: requests in, tokens out.
