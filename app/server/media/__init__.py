"""The videos and images that requests name: uploads, data: URLs, downloads and files under the media root."""
