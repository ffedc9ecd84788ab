// MLflow shows this page in a frame where a link to a place on the page leads nowhere; there, and only there, we scroll.
addEventListener("click", (event) => {
  const link = location.protocol === "blob:" && event.target.closest('a[href^="#"]');
  const place = link && document.getElementById(link.getAttribute("href").slice(1));
  if (!place) return;
  event.preventDefault();
  document.querySelector(".target")?.classList.remove("target");
  place.classList.add("target");
  place.scrollIntoView();
});
